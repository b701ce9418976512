"""The three kinds of weights: a Hugging Face folder, own arrays over a base, and none but a seed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import jax
import numpy as np
from etils import epath

from mole_jax.config import AdapterConfig, ImageAspect, PromptName, Quantisation
from mole_jax.config_json import identity_json
from mole_jax.errors import UserError
from mole_jax.files import absolute, read_json
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.foreign import HEADER, own_entry
from mole_jax.weights.hf_checkpoint import HfCheckpoint, content_hash
from mole_jax.weights.hf_config import CONFIG, GENERATION, PREPROCESSOR, PROCESSOR
from mole_jax.weights.leaf import Leaf, Leaves, as_leaf
from mole_jax.weights.source import Abstract, Source


@dataclasses.dataclass(frozen=True)
class HfSource:
    """A Hugging Face or original LLaVA folder."""

    checkpoint: HfCheckpoint
    architecture: LlavaArchitecture
    tokenizer: str | None
    prompt: PromptName | None
    image_aspect: ImageAspect | None
    adapter = AdapterConfig(kind="none")
    seed = 0
    trained = ()
    quantised = None
    step = None

    @classmethod
    def of(cls, checkpoint: HfCheckpoint) -> HfSource:
        """Opens one; of our own exports the config says how the run that they come from was trained.

        Raises:
            UserError: what it says is damaged.
        """
        where = checkpoint.folder / CONFIG
        said = own_entry(read_json(where).get(HEADER, {}), where=str(where))
        tokenizer = tokenizer_in(epath.Path(checkpoint.folder))
        arch = dataclasses.replace(checkpoint.architecture, **said.changes)
        return cls(checkpoint, arch, tokenizer, said.prompt, said.image_aspect)

    @property
    def processor_files(self) -> tuple[epath.Path, ...]:
        files = (self.checkpoint.folder / name for name in (PROCESSOR, PREPROCESSOR, GENERATION))
        return tuple(file for file in files if file.is_file())

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.checkpoint.left_out

    def content_hash(self) -> str:
        hashes = [content_hash(folder) for folder in self.checkpoint.folders]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        have = self.checkpoint.leaf_shapes()

        def array(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            # Each process reads only what its own devices hold.
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: self.checkpoint.read(path, index, leaf.dtype)
            )

        return {path: array(path, leaf) for path, leaf in abstract.items() if path in have}

    def leaves(self, paths: Collection[str]) -> dict[str, Leaf]:
        have = self.checkpoint.leaf_shapes()
        return {path: self.checkpoint.leaf(path) for path in paths if path in have}


class OwnArrays(Protocol):
    """The arrays that a `LayeredSource` holds itself."""

    @property
    def paths(self) -> Collection[str]: ...
    def stored(self) -> Mapping[str, Leaf]:
        """Returns all of them by path, unread and as they are stored."""
        ...

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        """Returns the arrays asked for; all of them are stored."""
        ...


class FileArrays:
    """Arrays of a file of adapters, each small enough for a host."""

    def __init__(self, arrays: Leaves):
        self._arrays = {path: as_leaf(path, array) for path, array in arrays.items()}

    @property
    def paths(self) -> Collection[str]:
        return self._arrays.keys()

    def stored(self) -> Mapping[str, Leaf]:
        return self._arrays

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        def array(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            value = np.asarray(self._arrays[path])
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: value[index].astype(leaf.dtype)
            )

        return {path: array(path, leaf) for path, leaf in abstract.items()}


@dataclasses.dataclass(frozen=True)
class LayeredSource:
    """A run, or adapters from a file: own arrays over those of a base."""

    name: str
    """What messages call it."""
    architecture: LlavaArchitecture
    adapter: AdapterConfig
    trained: tuple[str, ...]
    seed: int
    prompt: PromptName | None
    image_aspect: ImageAspect | None
    tokenizer: str | None
    own: OwnArrays
    identity: str
    """What its hash says of architecture and adapters: those that are stored."""
    base_name: str | None
    """Folder or hub name of the base. None: there is none, or it is made from the seed."""
    open_base: Callable[[], Source]
    """Opens it; not called before an array of the base is asked for."""
    recorded_hash: str | None
    """Hash of the base that the own arrays belong to. None: they do not say."""
    step: int | None = None
    quantised: Quantisation | None = None
    processor_files = ()

    @functools.cached_property
    def base(self) -> Source:
        """The base, open, and the one that the own arrays belong to.

        Raises:
            UserError: it is another one.
        """
        base = self.open_base()
        if self.recorded_hash not in (None, base.content_hash()):
            remedy = "name the original one with --base" if self.step is None else "put the original base back"
            raise UserError(
                f"{self.name}: was trained on another base than {self.base_name} now holds "
                f"(hash {self.recorded_hash[:12]}… expected); {remedy}"
            )
        return base

    @functools.cached_property
    def base_hash(self) -> str:
        """Hash of the base; it is only opened where the own arrays do not say."""
        return self.recorded_hash or self.base.content_hash()

    @property
    def left_out(self) -> tuple[str, ...]:
        return () if self.base_name is None else self.base.left_out

    def content_hash(self) -> str:
        # Over the arrays, not the files: orbax lays the same arrays out in other bytes at another time.
        digest = hashlib.sha256(f"{self.identity} {self.base_hash}".encode())
        for path, leaf in sorted(self.own.stored().items()):
            digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
            for part in leaf if leaf.stacked else (np.asarray(leaf),):
                digest.update(part.tobytes())
        return digest.hexdigest()

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        own, below = ({path: abstract[path] for path in paths} for paths in self._split(abstract))
        return (self.base.load(below) if below else {}) | self.own.load(own)

    def leaves(self, paths: Collection[str]) -> dict[str, Leaf]:
        own, below = self._split(paths)
        stored = self.own.stored()
        return (self.base.leaves(below) if below else {}) | {path: stored[path] for path in own}

    def _split(self, paths: Collection[str]) -> tuple[list[str], list[str]]:
        """Returns what is stored here, and what the base is to be asked for."""
        own = [path for path in paths if path in self.own.paths]
        return own, [] if self.base_name is None else [path for path in paths if path not in own]


@dataclasses.dataclass(frozen=True)
class RandomSource:
    """No files: every weight is made from the seed by the model itself."""

    architecture: LlavaArchitecture
    seed: int
    adapter = AdapterConfig(kind="none")
    trained = ()
    quantised = None
    prompt = None
    image_aspect = None
    tokenizer = None
    processor_files = ()
    left_out = ()
    step = None

    def content_hash(self) -> str:
        return hashlib.sha256(json.dumps([identity_json(self.architecture), self.seed]).encode()).hexdigest()

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        return {}

    def leaves(self, paths: Collection[str]) -> dict[str, Leaf]:
        return {}


def tokenizer_in(folder: epath.Path) -> str | None:
    """Returns the folder if it has a tokenizer."""
    names = ("tokenizer.model", "tokenizer.json")
    return str(folder) if any((folder / name).exists() for name in names) else None


def locate(name: str) -> str:
    """Returns the name under which a base is found again from another folder: hub names stay, paths become absolute."""
    folder = absolute(name)
    return str(folder) if folder.exists() else name
