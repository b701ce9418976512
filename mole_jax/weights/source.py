"""Where weights come from: a folder or file of any format, or a seed. The format is recognised, not named."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from etils import epath

from mole_jax import config_json
from mole_jax.config import AdapterConfig, ImageAspect, ModelConfig, PromptName
from mole_jax.config_json import identity
from mole_jax.errors import UserError
from mole_jax.model.architecture import LlavaArchitecture, preset
from mole_jax.weights import hf, llava_mole, mixlora, mole_folder, peft, run
from mole_jax.weights.adapter_source import AdapterSource
from mole_jax.weights.leaf import Leaf, as_leaf

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
    def prompt(self) -> PromptName | None: ...
    @property
    def image_aspect(self) -> ImageAspect | None: ...
    @property
    def tokenizer(self) -> str | None:
        """Folder with the tokenizer's files, if there is one."""
        ...

    def content_hash(self) -> str:
        """Returns what identifies these weights by their content."""
        ...

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        """Returns those of the arrays that this source has; the others are for the caller to make."""
        ...

    def leaves(self, abstract: Abstract) -> dict[str, Leaf]:
        """Returns the same arrays unread, in the types of `abstract`; the shardings do not matter."""
        ...


class HfSource:
    """A Hugging Face or original LLaVA folder, or a hub name of either."""

    adapter = AdapterConfig(kind="none")
    seed = 0
    trained = ()
    prompt = None
    image_aspect = None

    def __init__(self, name: str, vision: str | None = None):
        """Opens it; `vision` is a CLIP's folder, where `name` is a language model alone (the projector is then new)."""
        self.checkpoint = hf.HfCheckpoint.open(name, vision)
        self.architecture = self.checkpoint.architecture
        self.tokenizer = _tokenizer_in(epath.Path(self.checkpoint.folder))

    def content_hash(self) -> str:
        hashes = [hf.content_hash(folder) for folder in self.checkpoint.folders]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        have = self.checkpoint.leaf_shapes()

        def array(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            # Each process reads only what its own devices hold.
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: self.checkpoint.read(path, index, leaf.dtype)
            )

        return {path: array(path, leaf) for path, leaf in abstract.items() if path in have}

    def leaves(self, abstract: Abstract) -> dict[str, Leaf]:
        have = self.checkpoint.leaf_shapes()
        return {path: self.checkpoint.leaf(path, leaf.dtype) for path, leaf in abstract.items() if path in have}


class RunSource:
    """The newest checkpoint of a run's folder, on top of the base that it names."""

    def __init__(self, folder: epath.Path, step: int):
        self.folder, self.step = folder, step
        self.meta = run.read_meta(folder, step)
        self.architecture = self.meta.architecture
        self.adapter = self.meta.adapter
        self.trained = self.meta.trained
        self.seed = self.meta.seed
        self.prompt: PromptName | None = self.meta.prompt
        self.image_aspect: ImageAspect | None = self.meta.image_aspect
        self.tokenizer = _tokenizer_in(folder)

    @property
    def base_name(self) -> str | None:
        """Where the base is; None: there is none, or it is made from the seed."""
        if self.meta.base is None:
            return None
        # A base inside the run's own folder is named relative to it.
        inside = self.folder / self.meta.base
        return str(inside) if inside.exists() else self.meta.base

    def content_hash(self) -> str:
        # Over the arrays, not the files: orbax lays the same arrays out in other bytes at another time.
        digest = hashlib.sha256(f"{self.architecture} {identity(self.adapter)} {self.meta.base_hash}".encode())
        for path, leaf in run.stored_leaves(self.folder, self.step).items():
            digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
            for part in leaf if leaf.stacked else (np.asarray(leaf),):
                digest.update(part.tobytes())
        return digest.hexdigest()

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        own, below = self._split(abstract, run.stored_shapes(self.folder, self.step))
        lower = self._base().load(below) if below and self.base_name is not None else {}
        return lower | run.read_params(self.folder, self.step, own)

    def leaves(self, abstract: Abstract) -> dict[str, Leaf]:
        stored = run.stored_leaves(self.folder, self.step)
        own, below = self._split(abstract, stored)
        lower = self._base().leaves(below) if below and self.base_name is not None else {}
        return lower | {path: as_leaf(path, stored[path], leaf.dtype) for path, leaf in own.items()}

    def _split(self, abstract: Abstract, stored: Collection[str]) -> tuple[Abstract, Abstract]:
        """Cuts `abstract` into what is stored here and what is not."""
        own = {path: leaf for path, leaf in abstract.items() if path in stored}
        return own, {path: leaf for path, leaf in abstract.items() if path not in own}

    def _base(self) -> Source:
        base = open_source(str(self.base_name))
        if base.content_hash() != self.meta.base_hash:
            raise UserError(
                f"{self.folder}: was trained on another base than {self.meta.base} now holds "
                f"(hash {self.meta.base_hash[:12]}… expected); put the original base back"
            )
        return base


@dataclasses.dataclass(frozen=True)
class RandomSource:
    """No files: every weight is made from the seed by the model itself."""

    architecture: LlavaArchitecture
    seed: int
    adapter = AdapterConfig(kind="none")
    trained = ()
    prompt = None
    image_aspect = None
    tokenizer = None

    def content_hash(self) -> str:
        return hashlib.sha256(json.dumps([config_json.to_json(self.architecture), self.seed]).encode()).hexdigest()

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        return {}

    def leaves(self, abstract: Abstract) -> dict[str, Leaf]:
        return {}


def open_source(
    name: str, *, base: str | None = None, alpha: float | None = None, vision: str | None = None
) -> HfSource | RunSource | AdapterSource:
    """Opens weights of any format.

    Args:
        name: a run's folder (its newest checkpoint, or one named as FOLDER/checkpoints/STEP), a HF or original LLaVA
            folder, a hub name, a PEFT, MixLoRA or MoLE adapter folder, or a released LLaVA-MoLE file.
        base: what adapters stand on. None: what they name themselves.
        alpha: the scale's numerator, for a released LLaVA-MoLE file. None: as the file says, else twice its rank.
        vision: a CLIP's folder or hub name, to make a LLaVA of the language model `name`.

    Raises:
        UserError: it is none of these, what it holds does not fit together, or `base` is given to a whole model.
    """
    folder = run.absolute(name)
    if vision is not None:
        if base is not None or alpha is not None:
            raise UserError(f"{name}: with --vision it is a language model, so leave out --base and --alpha")
        return HfSource(name, vision)
    if (adapters := _open_adapters(name, folder, base, alpha)) is not None:
        return adapters
    if base is not None:
        raise UserError(f"{name}: holds no adapters without a base; leave out --base {base}")
    if alpha is not None:
        raise UserError(f"{name}: says its own alpha, if it has adapters; leave out --alpha {alpha:g}")
    if folder.parent.name == run.CHECKPOINTS and folder.name.isdigit() and folder.exists():
        return RunSource(folder.parent.parent, int(folder.name))
    step = run.latest_step(folder)
    if step is not None:
        return RunSource(folder, step)
    if (folder / run.CHECKPOINTS).exists():
        raise UserError(f"{name}: a run's folder without a finished checkpoint; train longer or choose another")
    if folder.exists() and not (folder / "config.json").exists():
        raise UserError(
            f"{name}: neither a run's folder (checkpoints/) nor a HF folder (config.json, *.safetensors) nor adapters"
        )
    return HfSource(name)


def _open_adapters(name: str, folder: epath.Path, base: str | None, alpha: float | None) -> AdapterSource | None:
    local = Path(folder)
    mole = llava_mole.is_llava_mole(local)
    if alpha is not None and not mole:
        return None
    # Each format: how it is recognised, the base that it names, how it is read.
    for recognised, recorded, reader in (
        (mole_folder.is_mole, mole_folder.mole_base, mole_folder.read_mole),
        (mixlora.is_mixlora, mixlora.mixlora_base, mixlora.read_mixlora),
        (peft.is_peft, peft.peft_base, peft.read_peft),
    ):
        if recognised(local):
            base, read = base or recorded(local), reader
            break
    else:
        if not mole:
            return None
        read = functools.partial(llava_mole.read_llava_mole, alpha=alpha)
    if base is None:
        raise UserError(f"{name}: holds adapters and does not name the model they stand on; give it with --base")
    below = open_source(base)
    return AdapterSource(name, read(local, below.architecture), below, base, _tokenizer_in(folder))


def locate(name: str) -> str:
    """Returns the name under which a base is found again from another folder: hub names stay, paths become absolute."""
    folder = run.absolute(name)
    return str(folder) if folder.exists() else name


def open_base(config: ModelConfig, seed: int) -> Source:
    """Opens what a training run starts from, with the config's changes to the architecture.

    Raises:
        UserError: as `open_source`, or the base carries adapters of its own.
    """
    source = RandomSource(preset(config.preset), seed) if config.preset else open_source(str(config.base))
    if source.adapter.kind != "none":
        raise UserError(
            f"config: model.base {config.base} carries {source.adapter.kind} adapters; train from its own base"
            + (", or merge them first with convert --to hf" if source.adapter.kind == "lora" else "")
        )
    changes: dict = {
        "feature_layer": config.feature_layer,
        "feature_select": config.feature_select,
        "image_vectors": config.image_vectors or None,
    }
    architecture = dataclasses.replace(
        source.architecture, **{name: value for name, value in changes.items() if value is not None}
    )
    if isinstance(source, RandomSource):
        return dataclasses.replace(source, architecture=architecture)
    source.architecture = architecture
    return source


def _tokenizer_in(folder: epath.Path) -> str | None:
    names = ("tokenizer.model", "tokenizer.json")
    return str(folder) if any((folder / name).exists() for name in names) else None


def tokenizer_path(config: ModelConfig, source: Source) -> str:
    """Returns where the tokenizer is.

    Raises:
        UserError: neither the config nor the base has one.
    """
    path = config.tokenizer or source.tokenizer
    if path is None:
        raise UserError(
            "config: model.tokenizer is not set and there is no tokenizer.model or tokenizer.json beside the weights; "
            "name a folder that has one"
        )
    return path
