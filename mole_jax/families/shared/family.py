"""What a family says of itself; each is a file of `mole_jax.families`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from mole_jax.families.shared.connectors import module_name
from mole_jax.families.shared.names import Row
from mole_jax.families.shared.processor import Processor
from mole_jax.families.shared.section import Section
from mole_jax.model.architecture import LlavaArchitecture

_BUFFERS = re.compile(r"(embeddings\.position_ids|rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached)$")


def no_buffers(name: str) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models: how its files are recognised, read and written."""

    name: str
    """As `LlavaArchitecture.family` has it."""
    types: tuple[str, ...]
    """What ``model_type`` of its config.json may be; the first is written."""
    classes: str
    """The class of transformers that loads it."""
    mark: str
    """The image token's text, where the tokenizer does not say."""
    read: Callable[[Section, Processor], LlavaArchitecture]
    """Makes the architecture of config.json and the processor's files; asks for every field that it knows."""
    config: Callable[[LlavaArchitecture], dict[str, Any]]
    """Returns the fields of config.json that are not every family's."""
    processor: Callable[[LlavaArchitecture, str], tuple[dict[str, Any], dict[str, Any]]]
    """Returns preprocessor_config.json and processor_config.json of a model whose image token has this text."""
    rows: Callable[[LlavaArchitecture], tuple[Row, ...]]
    """The table of its weights, in the order of written files."""
    canonical: Callable[[str], str]
    """Returns the name in that table of a tensor in any layout that is read."""
    module: Callable[[str], str] = module_name
    """Returns the name of a tensor of that table within the modules of transformers 5."""
    unused: Callable[[str], bool] = no_buffers
    """Tells of a canonical name whether its tensor is known and computes nothing of the model."""
    decoder: str = "language_model"
    """Names of the decoder, the tower and the connector among these modules."""
    tower: str = "vision_tower"
    connector: str = "multi_modal_projector"

    def ignores(self, name: str, arch: LlavaArchitecture) -> bool:
        """Tells of a canonical name whether it is known to carry nothing: computed buffers, and a tied head's copy."""
        tied = arch.decoder.tied_head and name.endswith("lm_head.weight")
        return bool(_BUFFERS.search(name)) or tied or self.unused(name)


Config = Mapping[str, Any]
