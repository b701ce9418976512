"""From the adapter's settings to what a decoder carries: the adapters of its projections and their mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mole_jax.adapters import experts, lora
from mole_jax.adapters.kind import Adapter, Kind, Projection
from mole_jax.adapters.mixture import Mixture
from mole_jax.config import AdapterConfig
from mole_jax.parameters import Declare

KINDS: Mapping[str, Kind] = {"none": Kind(lambda *_: None), "lora": lora.KIND, "mole": experts.KIND}
"""By `AdapterConfig.kind`."""


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Makes the adapters of a decoder, and those of its vision tower."""

    config: AdapterConfig

    @property
    def mixture(self) -> Mixture:
        """How the decoder's experts are chosen."""
        return Mixture(self.config, routed=KINDS[self.config.kind].routed)

    def projection(self, declare: Declare, projection: Projection) -> Adapter | None:
        """Makes the adapter of one projection; None where the settings give it none."""
        if projection.name not in self.config.targets:
            return None
        return KINDS[self.config.kind].make(self.config, declare, projection)

    def vision_projection(self, declare: Declare, projection: Projection) -> lora.LoRA | None:
        """Makes the plain LoRA of one projection of the vision tower; None where the settings give it none."""
        if projection.name not in self.config.vision_targets:
            return None
        return lora.make(self.config, declare, projection)
