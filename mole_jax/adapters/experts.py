"""LoRA experts of one projection, stacked so that routing is a mask in rank space."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mole_jax.adapters import expert_sharding, grouping
from mole_jax.adapters.lora import LoRA, flat
from mole_jax.adapters.router import Routing
from mole_jax.config import RouterGradient
from mole_jax.parallel import region
from mole_jax.parameters import Declare


class Experts(LoRA):
    """E LoRAs of rank R as one of rank E*R: ``delta(x) = (alpha / R) * (gates . (dropout(x) A)) B``.

    Columns ``e*R:(e+1)*R`` of A (D_in, E*R) and the same rows of B (E*R, D_out) are expert e. Zeroing
    the rank-space blocks of the experts that are not chosen gives the exact top-1 mixture with static
    shapes and no token dropped; gates that are probabilities give the dense mixture. The expert of the
    down projection acts on the hidden activations of the same token (released LLaVA-MoLE block).
    """

    def __init__(
        self,
        declare: Declare,
        d_in: int,
        d_out: int,
        axes: tuple[str, str],
        *,
        experts: int,
        rank: int,
        alpha: float,
        dropout: float,
        gradient: RouterGradient = "straight_through",
        movement: Literal["auto", "gather", "all_to_all"] = "auto",
        shared_rank: int = 0,
    ):
        """`rank` is that of one expert; `gradient`, `movement` and `shared_rank` are `AdapterConfig`'s; for the rest
        see `LoRA`."""
        super().__init__(
            declare,
            d_in,
            d_out,
            axes,
            rank=experts * rank,
            alpha=experts * alpha,
            dropout=dropout,
            rank_axis="expert",
        )
        self.gradient, self.movement = gradient, movement
        self.shared = (
            LoRA(declare, d_in, d_out, axes, rank=shared_rank, alpha=alpha * shared_rank / rank, dropout=dropout)
            if shared_rank
            else None
        )

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "B S I"], routing: Routing, keep: Bool[Array, "B S I"] | None = None
    ) -> Float[Array, "B S O"]:
        """Returns the gated sum of the experts' deltas, and the shared one's, in the type of `x`."""
        x = self.drop(x, keep)
        routed = self.routed(x, routing)
        return routed if self.shared is None else routed + self.shared(x)

    def routed(self, x: Float[Array, "B S I"], routing: Routing) -> Float[Array, "B S O"]:
        a, b = self.a[...], self.b[...]
        gates = routing.gates.astype(x.dtype)
        shared = region.expert_devices() > 1
        if shared and routing.groups is None and self.moves(x, a, b) == "all_to_all":
            x, gates = expert_sharding.all_tokens(x, gates)
            return expert_sharding.own_tokens(self.masked(x, a, b, region.own_experts(gates)))
        if shared:
            a, b = expert_sharding.whole_experts(a, b)
        return self.delta(x, a, b, gates, routing)

    def moves(self, x: Array, a: Array, b: Array) -> expert_sharding.Movement:
        """Returns what travels between the devices that share the experts."""
        if self.movement == "gather" or self.movement == "all_to_all":
            return self.movement
        devices = region.expert_devices()
        return expert_sharding.traffic(
            a.shape[0],
            b.shape[1],
            a.shape[1] * devices,
            x.shape[0] * x.shape[1],
            devices,
            weight_bytes=a.dtype.itemsize,
            token_bytes=x.dtype.itemsize,
        ).cheaper

    def delta(self, x: Array, a: Array, b: Array, gates: Array, routing: Routing) -> Float[Array, "B S O"]:
        if routing.groups is None:
            return self.masked(x, a, b, gates)
        delta = grouping.grouped(
            x,
            a.astype(x.dtype),
            b.astype(x.dtype),
            gates,
            routing.choice,
            routing.groups.sizes,
            all_gates=self.gradient == "straight_through",
        )
        return delta * self.scale

    def masked(
        self, x: Float[Array, "B S I"], a: Float[Array, "I e*R"], b: Float[Array, "e*R O"], gates: Float[Array, "B S e"]
    ) -> Float[Array, "B S O"]:
        h = flat(x) @ a.astype(x.dtype)
        # A product with ones, for a reshape to (e, R) makes a TPU change layouts: 3 % of a whole step (docs/pods.md).
        blocks = jnp.repeat(jnp.eye(gates.shape[-1], dtype=x.dtype), h.shape[-1] // gates.shape[-1], axis=1)
        spread = jnp.matmul(gates.reshape(*h.shape[:-1], -1), blocks, precision=jax.lax.Precision.HIGHEST)
        return (((h * spread) @ b.astype(x.dtype)) * self.scale).reshape(*x.shape[:-1], -1)
