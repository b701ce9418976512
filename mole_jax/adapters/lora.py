"""LoRA (Hu et al. 2021): a low-rank delta beside a frozen projection."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from mole_jax.adapters.kind import Kind, Projection
from mole_jax.adapters.products import by_head, joined
from mole_jax.adapters.router import Routing
from mole_jax.config import AdapterConfig
from mole_jax.parameters import AdapterParam, Declare, Parameter, kaiming_uniform, zeros


def low_rank_pair(
    declare: Declare, projection: Projection, rank: int, rank_axis: str = "rank"
) -> tuple[Parameter, Parameter]:
    """Declares A (D_in, R) and B (R, D_out).

    A starts Kaiming-uniform and B at zero, so a fresh adapter changes nothing. Both are transposed with respect to
    PEFT's ``lora_A`` (R, D_in) and ``lora_B`` (D_out, R).
    """
    declare, (axis_in, axis_out) = declare.of(AdapterParam), projection.axes
    a = declare((projection.d_in, rank), (axis_in, rank_axis), kaiming_uniform, decay=True)
    return a, declare((rank, projection.d_out), (rank_axis, axis_out), zeros, decay=True)


class LoRA(nnx.Module):
    """``delta(x) = scale * x A B`` with A (D_in, R) and B (R, D_out)."""

    def __init__(self, declare: Declare, projection: Projection, *, rank: int, scale: float):
        self.a, self.b = low_rank_pair(declare, projection, rank)
        self.scale = scale

    def __call__(
        self, x: Float[Array, "B S I"], routing: Routing | None = None, width: int | None = None
    ) -> Float[Array, "B S O"] | Float[Array, "B H S C"]:
        """Returns the delta in the type of `x`; every token uses it, whatever `routing` says."""
        h, b = (joined(x) @ self.a[...].astype(x.dtype)) * self.scale, self.b[...].astype(x.dtype)
        if width is None:
            return (h @ b).reshape(*x.shape[:-1], -1)
        return by_head(h.reshape(*x.shape[:-1], -1), b, width)


def make(config: AdapterConfig, declare: Declare, projection: Projection) -> LoRA:
    """Makes a LoRA of the config's rank: A and B scaled by its factor."""
    return LoRA(declare, projection, rank=config.rank, scale=config.factor)


KIND = Kind(make)
