"""Experts split over devices: either the experts move to the tokens, or the tokens to the experts."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from mole_jax.config import MLP_TARGETS, AdapterConfig, Movement
from mole_jax.parallel import region


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends and receives for one projection, forward and backward, without recomputation."""

    gather: int
    all_to_all: int

    @property
    def cheaper(self) -> Movement:
        return "gather" if self.gather <= self.all_to_all else "all_to_all"


def traffic(
    d_in: int, d_out: int, ranks: int, tokens: int, devices: int, *, weight_bytes: int = 4, token_bytes: int = 2
) -> Traffic:
    """Counts the bytes of both movements.

    Args:
        d_in, d_out: sizes of the projection, as far as one device holds them.
        ranks: E * R, the stacked ranks of all experts.
        tokens: tokens on one device.
        devices: number of devices that share the experts.
        weight_bytes, token_bytes: bytes of one number of the experts' matrices and of the activations.
    """
    others = devices - 1
    # An all-gather forward and a reduce-scatter of the same size backward.
    gather = 2 * others * (ranks // devices) * (d_in + d_out) * weight_bytes
    # Forward the inputs go to every device and the summed deltas come back; backward it is the other way round.
    all_to_all = 2 * others * tokens * (d_in + d_out) * token_bytes
    return Traffic(gather, all_to_all)


def explain(adapter: AdapterConfig, width: int, mlp_width: int, tokens: int, devices: int, dtype: str) -> str:
    """Returns a line for the log: what moves between the devices that share experts, and why.

    `width` and `mlp_width` are the parts that one device holds; `tokens` is the number of tokens on one device.
    """
    counted = traffic(
        width, mlp_width, adapter.experts * adapter.rank, tokens, devices, token_bytes=jnp.dtype(dtype).itemsize
    )
    targets = len([target for target in adapter.targets if target in MLP_TARGETS])
    here = counted.cheaper if adapter.expert_sharding == "auto" else adapter.expert_sharding
    sizes = {way: f"{targets * getattr(counted, way) / 2**20:,.1f} MiB" for way in ("gather", "all_to_all")}
    why = "the fewer bytes" if adapter.expert_sharding == "auto" else "as adapter.expert_sharding says"
    return (
        f"experts over {devices} devices: {here}, {why}; a layer moves {sizes['gather']} a device when experts travel "
        f"(gather), {sizes['all_to_all']} when tokens do (all_to_all)"
    )


def whole_experts(
    a: Float[Array, "I e*R"], b: Float[Array, "e*R O"]
) -> tuple[Float[Array, "I E*R"], Float[Array, "E*R O"]]:
    """`gather`: returns the matrices of all experts, for this device's own tokens."""
    return region.gather_experts(a, 1), region.gather_experts(b, 0)


def all_tokens(*arrays: Float[Array, "B ..."]) -> tuple[Float[Array, "n*B ..."], ...]:
    """`all_to_all`: returns the tokens of all devices, for this device's own experts; `own_tokens` is the way back.

    A token needs one expert only, but how many tokens each device will be asked about is not known when shapes are
    fixed. The only bound that never drops a token is all of them, and with it an exchange of equal shapes is this
    all-gather. It also serves the router gradients that need every expert's answer about every token.
    """
    return tuple(map(region.gather_rows, arrays))


def own_tokens(delta: Float[Array, "n*B S O"]) -> Float[Array, "B S O"]:
    """Sums the deltas over the devices that share the experts and returns those of this device's tokens."""
    return region.scatter_rows(delta)
