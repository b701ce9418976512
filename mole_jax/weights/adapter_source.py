"""Adapters from a file on top of a base, as a source of weights."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import jax
import numpy as np

from mole_jax.config import ImageAspect, PromptName
from mole_jax.errors import UserError
from mole_jax.weights.foreign import AdapterFile
from mole_jax.weights.leaf import Leaf, as_leaf

if TYPE_CHECKING:
    from mole_jax.weights.source import Abstract, Source


class AdapterSource:
    """What `file` has, and below it what `base` has.

    Attributes:
        base: the source below.
        base_name: where it was found.
    """

    def __init__(self, name: str, file: AdapterFile, base: Source, base_name: str, tokenizer: str | None = None):
        """Joins them; `tokenizer` is the folder of the adapters' own, if they have one.

        Raises:
            UserError: the file says that it belongs to another base, or the base carries adapters itself.
        """
        if base.adapter.kind != "none":
            raise UserError(f"{base_name}: carries {base.adapter.kind} adapters itself; give the base of {name}")
        if file.base_hash is not None and base.content_hash() != file.base_hash:
            raise UserError(
                f"{name}: was trained on another base than {base_name} now holds "
                f"(hash {file.base_hash[:12]}… expected); name the original one with --base"
            )
        self.base, self.base_name = base, base_name
        self.architecture = dataclasses.replace(base.architecture, **file.changes)
        self.adapter = file.adapter
        self.trained = file.trained
        self.seed = base.seed
        self.prompt: PromptName | None = file.prompt or base.prompt
        self.image_aspect: ImageAspect | None = file.image_aspect or base.image_aspect
        self.tokenizer = tokenizer or base.tokenizer
        self._arrays = file.arrays

    @property
    def paths(self) -> frozenset[str]:
        """Arrays that the file itself holds."""
        return frozenset(self._arrays)

    def content_hash(self) -> str:
        digest = hashlib.sha256(f"{self.architecture} {self.adapter} {self.base.content_hash()}".encode())
        for path, leaf in sorted(self._arrays.items()):
            array = np.asarray(leaf)
            digest.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        own = {}
        for path, leaf in abstract.items():
            if path in self._arrays:
                value = np.asarray(self._arrays[path])
                own[path] = jax.make_array_from_callback(
                    leaf.shape, leaf.sharding, lambda index, value=value, leaf=leaf: value[index].astype(leaf.dtype)
                )
        return own | self.base.load({path: leaf for path, leaf in abstract.items() if path not in own})

    def leaves(self, abstract: Abstract) -> dict[str, Leaf]:
        own = {path: leaf for path, leaf in abstract.items() if path in self._arrays}
        below = {path: leaf for path, leaf in abstract.items() if path not in own}
        return {path: as_leaf(path, self._arrays[path], leaf.dtype) for path, leaf in own.items()} | (
            self.base.leaves(below) if below else {}
        )
