"""LoRA (Hu et al. 2021): a low-rank delta beside a frozen projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mole_jax.parallel.devices import kind_in_force
from mole_jax.parameters import AdapterParam, Declare, kaiming_uniform, zeros


class LoRA(nnx.Module):
    """``delta(x) = (alpha / rank) * dropout(x) A B`` with A (D_in, R) and B (R, D_out).

    A starts Kaiming-uniform and B at zero, so that a fresh adapter changes nothing. The matrices are
    transposed with respect to PEFT's ``lora_A`` (R, D_in) and ``lora_B`` (D_out, R).
    """

    def __init__(
        self,
        declare: Declare,
        d_in: int,
        d_out: int,
        axes: tuple[str, str],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        rank_axis: str = "rank",
    ):
        """`axes` are the names of the projection's input and output axis."""
        declare = declare.of(AdapterParam)
        self.a = declare((d_in, rank), (axes[0], rank_axis), kaiming_uniform, decay=True)
        self.b = declare((rank, d_out), (rank_axis, axes[1]), zeros, decay=True)
        self.scale = alpha / rank
        self.dropout = dropout

    def keep(self, key: PRNGKeyArray | None, rows: int, length: int) -> Bool[Array, "B S I"] | None:
        """Returns which elements of an input dropout keeps; None, for all of them, without a key."""
        if key is None or self.dropout == 0:
            return None
        # 16 bits an element are half the work of `bernoulli`'s 32; the rate is right to 8e-6.
        bits = jax.random.bits(key, (rows, length, self.a.shape[-2]), jnp.uint16)
        return bits >= round(self.dropout * 2**16)

    def __call__(self, x: Float[Array, "B S I"], keep: Bool[Array, "B S I"] | None = None) -> Float[Array, "B S O"]:
        """Returns the delta in the type of `x`; `keep` turns dropout on."""
        delta = (flat(self.drop(x, keep)) @ self.a[...].astype(x.dtype) @ self.b[...].astype(x.dtype)) * self.scale
        return delta.reshape(*x.shape[:-1], -1)

    def drop(self, x: Float[Array, "B S I"], keep: Bool[Array, "B S I"] | None) -> Float[Array, "B S I"]:
        """Zeroes what is not kept and rescales the rest; the identity without `keep`."""
        return x if keep is None else jnp.where(keep, x / (1 - self.dropout), jnp.zeros_like(x))


def flat(x: Float[Array, "B S I"]) -> Float[Array, "*T I"]:
    """Returns rows and tokens as one axis where that is faster.

    A CPU takes half the time for gradients that are sums over one axis. A TPU's compiler lays out two as it likes; made
    to take one, a whole step with 1,024 stacked ranks takes it 5 % longer (docs/pods.md).
    """
    return x.reshape(-1, x.shape[-1]) if kind_in_force() == "cpu" else x
