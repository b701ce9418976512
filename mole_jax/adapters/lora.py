"""LoRA (Hu et al. 2021): a low-rank delta beside a frozen projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mole_jax.parameters import AdapterParam, Declare, kaiming_uniform, zeros


def dropout(x: Float[Array, "*S"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*S"]:
    """Zeroes each element with probability `rate` and rescales the rest; the identity without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


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
    ):
        """`axes` are the names of the projection's input and output axis."""
        declare = declare.of(AdapterParam)
        self.a = declare((d_in, rank), (axes[0], "rank"), kaiming_uniform, decay=True)
        self.b = declare((rank, d_out), ("rank", axes[1]), zeros, decay=True)
        self.scale = alpha / rank
        self.dropout = dropout

    def __call__(self, x: Float[Array, "B S I"], key: PRNGKeyArray | None = None) -> Float[Array, "B S O"]:
        """Returns the delta in the type of `x`; `key` turns dropout on."""
        return self.up(self.down(x, key))

    def down(self, x: Float[Array, "B S I"], key: PRNGKeyArray | None) -> Float[Array, "B S R"]:
        x = dropout(x, self.dropout, key)
        return x @ self.a[...].astype(x.dtype)

    def up(self, h: Float[Array, "B S R"]) -> Float[Array, "B S O"]:
        return (h @ self.b[...].astype(h.dtype)) * self.scale
