"""Weights that can be loaded, wherever they come from: what every source of them offers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import jax
from etils import epath

from mole_jax.config import AdapterConfig, ImageAspect, PromptName, Quantisation
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.leaf import Leaf

Abstract = Mapping[str, jax.ShapeDtypeStruct]
"""Shape, type and sharding of the arrays wanted, by path."""


class Source(Protocol):
    """Weights that can be loaded into shardings."""

    @property
    def architecture(self) -> LlavaArchitecture: ...
    @property
    def adapter(self) -> AdapterConfig: ...
    @property
    def seed(self) -> int:
        """Seed of the arrays that no file holds (adapters that never trained)."""
        ...

    @property
    def trained(self) -> tuple[str, ...]:
        """Groups that are float32 here; the rest is frozen."""
        ...

    @property
    def quantised(self) -> Quantisation | None:
        """How the base was quantised while these weights were trained on it; what is stored is not."""
        ...

    @property
    def prompt(self) -> PromptName | None: ...
    @property
    def image_aspect(self) -> ImageAspect | None: ...
    @property
    def tokenizer(self) -> str | None:
        """Folder with the tokenizer's files, if there is one."""
        ...

    @property
    def processor_files(self) -> tuple[epath.Path, ...]:
        """Files beside the weights that say how pictures are prepared and what ends an answer; a run says it itself."""
        ...

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of stored tensors that compute nothing of the model, and which are not read."""
        ...

    @property
    def step(self) -> int | None:
        """Step of a run's checkpoint; None: these weights are no checkpoint of a run."""
        ...

    def content_hash(self) -> str:
        """Returns what identifies these weights by their content."""
        ...

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        """Returns those of the arrays that this source has; the others are for the caller to make."""
        ...

    def leaves(self, paths: Collection[str]) -> dict[str, Leaf]:
        """Returns those of the arrays at `paths` that this source has, unread and in the types that they have there."""
        ...
