"""LoRA experts of one projection, stacked so that routing is a mask in rank space."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mole_jax.adapters import expert_sharding, grouping, lora
from mole_jax.adapters.kind import Kind, Projection
from mole_jax.adapters.lora import LoRA, low_rank_pair
from mole_jax.adapters.products import joined
from mole_jax.adapters.router import Routing
from mole_jax.config import MLP_TARGETS, AdapterConfig, Movement, RouterGradient
from mole_jax.parallel import region
from mole_jax.parameters import Declare


class Experts(nnx.Module):
    """E LoRAs of rank R with one pair of matrices: ``delta(x) = scale * (gates . (x A)) B``.

    Columns ``e*R:(e+1)*R`` of A (D_in, E*R) and the same rows of B (E*R, D_out) are expert e. Zeroing the rank-space
    blocks of the experts that are not chosen gives the exact top-1 mixture with static shapes and no dropped token;
    gates that are probabilities give the dense mixture. The down projection's expert acts on the hidden activations of
    the same token (released LLaVA-MoLE block).
    """

    def __init__(
        self,
        declare: Declare,
        projection: Projection,
        *,
        experts: int,
        rank: int,
        scale: float,
        gradient: RouterGradient = "straight_through",
        movement: Literal["auto", Movement] = "auto",
        shared_rank: int = 0,
    ):
        """`rank` is that of one expert; `gradient`, `movement` and `shared_rank` are those of `AdapterConfig`."""
        self.a, self.b = low_rank_pair(declare, projection, experts * rank, "expert")
        self.scale = scale
        self.gradient = gradient
        self.movement: Literal["auto", Movement] = movement
        self.shared = LoRA(declare, projection, rank=shared_rank, scale=scale) if shared_rank else None

    def __call__(
        self, x: Float[Array, "B S I"], routing: Routing | None, width: int | None = None
    ) -> Float[Array, "B S O"]:
        """Returns the gated sum of the experts' deltas, plus the shared expert's, in the type of `x`."""
        assert routing is not None, "experts stand in MLPs, which are routed"
        assert width is None, "what an MLP computes has no heads"
        routed = self.routed(x, routing)
        return routed if self.shared is None else routed + self.shared(x)

    def routed(self, x: Float[Array, "B S I"], routing: Routing) -> Float[Array, "B S O"]:
        """Returns the gated sum of the experts' deltas, wherever the experts are."""
        a, b = self.a[...], self.b[...]
        gates = routing.gates.astype(x.dtype)
        split = region.expert_devices() > 1
        if split and routing.groups is None and self.moves(x, a, b) == "all_to_all":
            x, gates = expert_sharding.all_tokens(x, gates)
            return expert_sharding.own_tokens(self.masked(x, a, b, region.own_experts(gates)))
        if split:
            a, b = expert_sharding.whole_experts(a, b)
        return self.delta(x, a, b, gates, routing)

    def moves(self, x: Array, a: Array, b: Array) -> Movement:
        """Returns what travels between the devices that share the experts."""
        if self.movement != "auto":
            return self.movement
        devices = region.expert_devices()
        return expert_sharding.traffic(
            d_in=a.shape[0],
            d_out=b.shape[1],
            ranks=a.shape[1] * devices,
            tokens=x.shape[0] * x.shape[1],
            devices=devices,
            weight_bytes=a.dtype.itemsize,
            token_bytes=x.dtype.itemsize,
        ).cheaper

    def delta(self, x: Array, a: Array, b: Array, gates: Array, routing: Routing) -> Float[Array, "B S O"]:
        """Returns the deltas of experts that are whole on this device; sorted tokens are multiplied group by group."""
        if routing.groups is None:
            return self.masked(x, a, b, gates)
        delta = grouping.grouped(
            x,
            a.astype(x.dtype),
            b.astype(x.dtype),
            gates=gates * self.scale,
            choice=routing.choice,
            sizes=routing.groups.sizes,
            all_gates=self.gradient == "straight_through",
        )
        return delta

    def masked(
        self, x: Float[Array, "B S I"], a: Float[Array, "I e*R"], b: Float[Array, "e*R O"], gates: Float[Array, "B S e"]
    ) -> Float[Array, "B S O"]:
        """Returns the deltas of e experts computed for every token and multiplied by their gates."""
        h = joined(x) @ a.astype(x.dtype)
        # A product with ones, for a reshape to (e, R) makes a TPU change layouts: 3 % of a whole step (docs/pods.md).
        blocks = jnp.repeat(jnp.eye(gates.shape[-1], dtype=x.dtype), h.shape[-1] // gates.shape[-1], axis=1)
        spread = jnp.matmul(gates.reshape(*h.shape[:-1], -1), blocks, precision=jax.lax.Precision.HIGHEST)
        return ((h * (spread * self.scale)) @ b.astype(x.dtype)).reshape(*x.shape[:-1], -1)


def make(config: AdapterConfig, declare: Declare, projection: Projection) -> LoRA | Experts:
    """Makes routed experts for a projection of the MLP and a plain LoRA for one of attention."""
    if projection.name not in MLP_TARGETS:
        return lora.make(config, declare, projection)
    return Experts(
        declare,
        projection,
        experts=config.experts,
        rank=config.rank,
        scale=config.factor,
        gradient=config.router_gradient,
        movement=config.expert_sharding,
        shared_rank=config.shared_rank,
    )


KIND = Kind(make, routed=True)
