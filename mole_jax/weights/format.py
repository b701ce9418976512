"""What a format of weights declares about itself; the formats are in `mole_jax.weights.formats`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np
from etils import epath

from mole_jax.config import AdapterConfig
from mole_jax.config_json import LATER, identity
from mole_jax.errors import UserError
from mole_jax.families.shared.decoders import kind_of
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.foreign import AdapterFile, of_pixels
from mole_jax.weights.hf_folder import Beside
from mole_jax.weights.leaf import Leaf
from mole_jax.weights.run import Meta
from mole_jax.weights.source import Source
from mole_jax.weights.sources import FileArrays, HfSource, LayeredSource, locate, tokenizer_in

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Types that can be written."""

Opened = HfSource | LayeredSource


@dataclasses.dataclass(frozen=True)
class Given:
    """Weights as a user names them."""

    name: str
    path: epath.Path
    """Where they are; of a hub name, the folder that it was downloaded to."""
    open: Callable[[str], Source]
    """Opens other weights by their name."""
    base: str | None = None
    """What adapters stand on. None: what they name themselves."""
    alpha: float | None = None
    """Numerator of the scale of a file that does not say it."""
    vision: str | None = None
    """Folder or hub name of a CLIP, where `name` is a language model alone."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Weights on their way into a format."""

    where: str
    """What messages call them."""
    source: Source
    adapter: AdapterConfig
    """The source's, or the plain LoRA that one of its experts makes."""
    leaves: dict[str, Leaf] = dataclasses.field(default_factory=dict)
    """The arrays that the format wants, in the types in which they are written; none yet while it is asked whether it
    can hold them."""

    @property
    def architecture(self) -> LlavaArchitecture:
        return self.source.architecture

    @property
    def base(self) -> tuple[str, str] | None:
        """Name and hash of what the adapters stand on, if it has a name."""
        if isinstance(self.source, LayeredSource) and self.source.base_name is not None:
            return locate(self.source.base_name), self.source.base_hash
        return None

    @property
    def base_name(self) -> str | None:
        return self.base and self.base[0]

    def beside(self, *, grows: bool = True) -> Beside:
        """Returns what stands beside the tensors in a Hugging Face folder; `grows`: the embedding may get rows.

        Raises:
            UserError: the tokenizer does not fit the model.
        """
        source = self.source
        return Beside.of(
            source.architecture,
            tokenizer=source.tokenizer,
            prompt=source.prompt,
            image_aspect=source.image_aspect,
            grows=grows,
        )

    @property
    def settings(self) -> dict[str, str | None]:
        """What the header of a file says of the training's prompts."""
        said = {"prompt": self.source.prompt, "image_aspect": self.source.image_aspect}
        return said | of_pixels(self.source.architecture)

    def meta(self, adapter: AdapterConfig, trained: tuple[str, ...]) -> Meta:
        """Returns what a checkpoint of these weights says about itself."""
        base = self.base if trained else None
        return Meta(
            architecture=self.architecture,
            adapter=adapter,
            trained=trained,
            prompt=self.source.prompt,
            image_aspect=self.source.image_aspect,
            base=base[0] if base else None,
            base_hash=base[1] if base else self.source.content_hash(),
            seed=self.source.seed,
            quantised=self.source.quantised if base else None,
        )

    def save_tokenizer(self, folder: str) -> None:
        """Writes the tokenizer beside the weights, if there is one."""
        if self.source.tokenizer is not None:
            Tokenizer.load(self.source.tokenizer).save(folder)


def all_arrays(export: Export, path: str, group: str) -> bool:
    """Wants the whole model."""
    return True


def trained_arrays(export: Export, path: str, group: str) -> bool:
    """Wants what was trained, and adapters that were not."""
    return group in {*export.source.trained, "adapters", "router"}


@dataclasses.dataclass(frozen=True)
class Format:
    """One format: what it is called, how it is recognised, what it can hold, how it is read and written."""

    name: str
    reads: str = ""
    """What is recognised, in words. Empty: it is only written."""
    recognise: Callable[[Given], bool] = lambda given: False
    options: tuple[str, ...] = ()
    """Which of base, alpha and vision go with it."""
    read: Callable[[Given], Opened] | None = None
    """Opens it; raises `UserError` for what does not fit together."""
    writes: str = ""
    """What is written, in words."""
    to: str = ""
    """What ``--to`` calls it, where formats share a name there. Empty: its name."""
    kinds: tuple[str, ...] = ("none", "lora", "mole")
    """Kinds of adapters that it holds."""
    every_setting: bool = False
    """It keeps all settings of the adapters; the others have no place for a shared expert or another way to route."""
    one_expert: bool = False
    """It can be made of one expert, as a plain LoRA."""
    library: str = ""
    """What the hub calls the library that loads it; beside what a run has trained goes a model card for it."""
    whole: bool = False
    """It is a whole model in which nothing tells what was trained: that is written in the type of the rest."""
    wants: Callable[[Export, str, str], bool] = all_arrays
    """Tells whether it holds the array of this path and parameter group."""
    check: Callable[[Export], None] = lambda export: None
    """Raises `UserError` with the reason if it has no place for these weights; before they are loaded."""
    write: Callable[[Export, str], None] | None = None
    """Writes them into a folder."""

    @property
    def choice(self) -> str:
        """What ``--to`` calls it."""
        return self.to or self.name


def not_a_llama(arch: LlavaArchitecture, *families: str) -> str | None:
    """Returns in words why a model is no Llama in one of these families' files; None if it is one."""
    kind = kind_of(arch.decoder)
    if kind != "llama":
        return f"has the decoder of a {kind}, not of a Llama"
    return None if arch.family in families else f"is of the family {arch.family}, not {' or '.join(families)}"


def over_base(
    given: Given, recorded: str | None, reader: Callable[[epath.Path, LlavaArchitecture], AdapterFile]
) -> LayeredSource:
    """Opens adapters and below them their base.

    Args:
        given: the adapters, and their base if the user names it.
        recorded: the base that the adapters name themselves, if they do.
        reader: reads the adapters against the architecture of the base.

    Raises:
        UserError: there is no base, it carries adapters itself, or it is not the one that the adapters belong to.
    """
    base_name = given.base or recorded
    if base_name is None:
        raise UserError(f"{given.name}: holds adapters and does not name the model they stand on; give it with --base")
    base = given.open(base_name)
    file = reader(given.path, base.architecture)
    if base.adapter.kind != "none":
        raise UserError(f"{base_name}: carries {base.adapter.kind} adapters itself; give the base of {given.name}")
    architecture = dataclasses.replace(base.architecture, **file.changes)
    source = LayeredSource(
        name=given.name,
        architecture=architecture,
        adapter=file.adapter,
        trained=file.trained,
        seed=base.seed,
        prompt=file.prompt or base.prompt,
        image_aspect=file.image_aspect or base.image_aspect,
        tokenizer=tokenizer_in(given.path) or base.tokenizer,
        own=FileArrays(file.arrays),
        identity=f"{identity(architecture)} {identity(file.adapter, LATER)}",
        base_name=base_name,
        open_base=lambda: base,
        recorded_hash=file.base_hash,
        quantised=file.quantised,
    )
    _ = source.base  # a wrong base is refused now, while the user looks at both names
    return source


def check_trained(export: Export) -> None:
    """Raises `UserError` if more was trained than a file of adapters holds."""
    beyond = sorted({"vision", "decoder"} & set(export.source.trained))
    if beyond:
        raise UserError(
            f"{export.where}: its {' and '.join(beyond)} was trained too, which adapters leave out; use --to hf"
        )
