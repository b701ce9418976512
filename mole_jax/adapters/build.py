"""From the adapter's settings to the modules that a decoder layer carries."""

from __future__ import annotations

import dataclasses

from mole_jax.adapters import grouping
from mole_jax.adapters.experts import Experts
from mole_jax.adapters.lora import LoRA
from mole_jax.adapters.router import Router
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
        config = self.config
        if not self.routed:
            return None
        return Router(declare, width, config.experts, bias=config.router_bias, gradient=config.router_gradient)

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
            )
        return LoRA(declare, d_in, d_out, axes, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
