"""What a file of adapters says, in this project's words, and the names that such files share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mole_jax.config import AdapterConfig, ImageAspect, PromptName
from mole_jax.weights.leaf import Leaves

MODULES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""Llama's name of each projection within its layer."""


def target_path(target: str) -> str:
    """Returns our path of a projection's module."""
    return "decoder/layers/" + MODULES[target].replace("self_attn.", "attention/").replace("mlp.", "mlp/")


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The content of a file of adapters, read against the architecture of its base."""

    adapter: AdapterConfig
    arrays: Leaves
    """Whatever the file has, by our path; what is not here is the base's."""
    trained: tuple[str, ...]
    """Parameter groups that the file brings."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `LlavaArchitecture` that differ from the base's."""
    prompt: PromptName | None = None
    image_aspect: ImageAspect | None = None
    base_hash: str | None = None
    """Hash of the base that the file belongs to; None: it does not say."""
