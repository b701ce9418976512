"""From the adapter's settings to the modules that a decoder layer carries."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from mole_jax.adapters import grouping
from mole_jax.adapters.experts import Experts
from mole_jax.adapters.lora import LoRA
from mole_jax.adapters.router import Router, Routing, route
from mole_jax.config import MLP_TARGETS, AdapterConfig
from mole_jax.parameters import Declare


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Makes the adapters of one decoder layer; the decoder asks by target name and gets None where there is none."""

    config: AdapterConfig

    @property
    def routed(self) -> bool:
        return self.config.kind == "mole"

    def router(self, declare: Declare, width: int) -> Router | None:
        """Makes the router of one layer, where each has its own."""
        return None if self.config.shared_router else self._router(declare, width)

    def shared_router(self, declare: Declare, width: int) -> Router | None:
        """Makes the router of all layers, where they share one."""
        return self._router(declare, width) if self.config.shared_router else None

    def _router(self, declare: Declare, width: int) -> Router | None:
        config = self.config
        if not self.routed or config.route_by == "domain":
            return None
        return Router(declare, width, config.experts, bias=config.router_bias)

    @property
    def route_by(self) -> str:
        return self.config.route_by if self.routed else "token"

    def route(self, logits: Float[Array, "B S E"]) -> Routing:
        return route(logits, self.config.router_gradient)

    def by_domain(self, domain_ids: Int[Array, "B S"]) -> Float[Array, "B S E"]:
        """Returns logits that leave no choice: domain i goes to expert i modulo E."""
        chosen = jax.nn.one_hot(domain_ids % self.config.experts, self.config.experts)
        return (chosen - 1) * 1e9

    def groups(self, tokens: int) -> bool:
        """Returns whether so many tokens are to be sorted by expert."""
        config = self.config
        if config.expert_path == "auto":
            possible = config.router_gradient != "dense" and config.expert_sharding != "all_to_all"
            return possible and grouping.pays(config.experts * config.rank, tokens)
        return config.expert_path == "grouped"

    def projection(
        self, declare: Declare, target: str, d_in: int, d_out: int, axes: tuple[str, str]
    ) -> LoRA | Experts | None:
        """Returns the adapter of one projection; MLP targets are routed experts when the kind is mole."""
        config = self.config
        if config.kind == "none" or target not in config.targets:
            return None
        if self.routed and target in MLP_TARGETS:
            return Experts(
                declare,
                d_in,
                d_out,
                axes,
                experts=config.experts,
                rank=config.rank,
                alpha=config.alpha,
                dropout=config.dropout,
                gradient=config.router_gradient,
                movement=config.expert_sharding,
                shared_rank=config.shared_rank,
            )
        return LoRA(declare, d_in, d_out, axes, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
