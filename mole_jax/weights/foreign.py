"""What a file of adapters says, in this project's words, and how such a file is read: every tensor accounted for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from mole_jax import config_json
from mole_jax.config import VISION_TARGETS, AdapterConfig, ImageAspect, PromptName, Quantisation
from mole_jax.errors import UserError
from mole_jax.families.shared.names import LeafSpec
from mole_jax.files import PathLike
from mole_jax.image_spec import Exif, ImageSpec, Transparency
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.leaf import Leaf, Leaves, widest

Shape = tuple[int, ...]

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
HEADER = "mole_jax"
"""Our own entry in the header of a safetensors file of another project's format."""
READ_TYPES = ("float32", "bfloat16", "float16", "float64")
"""Types of weights as numpy calls them. Whole numbers (8 or 4 bits) would need scales, which these formats lack."""
_NAMED = 5  # a message names so many keys and counts the rest


MAX_RANK, MAX_EXPERTS = 1 << 16, 1 << 12
"""Largest sizes of adapters that are taken from a file."""


def check_adapter(adapter: AdapterConfig, *, where: PathLike) -> AdapterConfig:
    """Returns adapters read from a file; raises `UserError` that names a setting which none can have."""
    sizes = (("rank", adapter.rank, MAX_RANK), ("experts", adapter.experts, MAX_EXPERTS))
    for name, value, limit in sizes:
        if not 1 <= value <= limit:
            raise UserError(f"{where}: {name} of the adapters is {value}, expected 1 to {limit:,}; the file is damaged")
    if not 0 <= adapter.shared_rank <= MAX_RANK or not math.isfinite(adapter.alpha):
        raise UserError(
            f"{where}: the adapters have shared_rank {adapter.shared_rank} and alpha {adapter.alpha}; "
            "the file is damaged"
        )
    if unknown := sorted(set(adapter.targets) - set(MODULES)):
        raise UserError(f"{where}: the adapters' targets name {unknown[0]!r}, expected some of {', '.join(MODULES)}")
    if unknown := sorted(set(adapter.vision_targets) - set(VISION_TARGETS)):
        raise UserError(
            f"{where}: the adapters' vision_targets name {unknown[0]!r}, expected some of {', '.join(VISION_TARGETS)}"
        )
    return adapter


def target_path(target: str) -> str:
    """Returns our path of a projection's module."""
    return "decoder/layers/" + MODULES[target].replace("self_attn.", "attention/").replace("mlp.", "mlp/")


def vision_path(target: str) -> str:
    """Returns our path of a vision tower's projection."""
    return f"vision/layers/{'mlp' if target.startswith('fc') else 'attention'}/{target}"


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
    quantised: Quantisation | None = None
    """How the base was quantised when the file's arrays were trained, if it was and the file says it."""


@dataclasses.dataclass(frozen=True)
class OwnHeader:
    """What our files of other projects' formats say of a run; nothing where others wrote them."""

    adapter: AdapterConfig | None = None
    prompt: PromptName | None = None
    image_aspect: ImageAspect | None = None
    exif: Exif | None = None
    transparency: Transparency | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of `LlavaArchitecture` that it sets."""
        return {name: getattr(self, name) for name in OF_PIXELS if getattr(self, name) is not None}


OF_PIXELS = ("exif", "transparency")


def of_pixels(arch: LlavaArchitecture | ImageSpec) -> dict[str, Any]:
    """Returns what a header says of how images were read in training; nothing where it was as LLaVA reads them."""
    defaults = {one.name: one.default for one in dataclasses.fields(arch)}
    return {name: getattr(arch, name) for name in OF_PIXELS if getattr(arch, name) != defaults[name]}


def own_header(metadata: Mapping[str, str], where: epath.Path) -> OwnHeader:
    """Reads our own entry of a tensor file's header; raises `UserError` if it is damaged."""
    try:
        values = json.loads(metadata.get(HEADER, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its header's '{HEADER}' is no JSON object ({error}); convert it again") from None
    return own_entry(values, f"{where}: header")


def own_entry(values: Any, where: str) -> OwnHeader:
    """Returns our own entry of another project's file; raises `UserError` if it is damaged."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: '{HEADER}' is a {type(values).__name__} and no JSON object; convert it again")
    header = config_json.dataclass_from_json(values, OwnHeader, where=where)
    if header.adapter is not None:
        check_adapter(header.adapter, where=where)
    return header


class Tensors(Protocol):
    """The tensors of a file or of several."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def types(self) -> Mapping[str, str]: ...
    def read(self, name: str, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class ReadTensor:
    """Reads tensors by their names in a table."""

    tensors: Tensors
    stored: Mapping[str, str]
    """Names in the file by those of the table."""

    def __call__(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors.read(self.stored[name]))

    def dtype(self, name: str) -> np.dtype:
        """Returns the type of a tensor, which is not read for it."""
        return np.dtype(self.tensors.types[self.stored[name]])


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our arrays in a table of names: the tensors that it is made of."""

    names: Sequence[str]
    """In the order in which `array` takes them."""
    shape: Shape
    """Of each of them."""
    array: Callable[[Sequence[str], ReadTensor], np.ndarray | Leaf]
    """Makes our array, of the names and the function that reads a tensor."""


def spec_row(spec: LeafSpec, names: Sequence[str] | None = None) -> Row:
    """Returns the row of an array that is kept as Hugging Face keeps it, under other `names`. It stays in its file."""

    def array(names: Sequence[str], read: ReadTensor) -> Leaf:
        def layer(number: int) -> np.ndarray:
            return spec.ours(read(names[number]))

        return typed_leaf(spec, [read.dtype(name) for name in names], layer)

    return Row(names or spec.names, spec.foreign_shape, array)


def typed_leaf(spec: LeafSpec, dtypes: Sequence[np.dtype], read: Callable[[int], np.ndarray]) -> Leaf:
    """Returns an array whose layers, or whose one tensor, are of these types; float64 is read as float32."""
    dtypes = [np.dtype(np.float32) if one == np.float64 else one for one in dtypes]
    whole = widest(dtypes)
    same = all(one == whole for one in dtypes)
    return Leaf(spec.shape, whole, spec.stacked, read, () if same else tuple(dtypes))


def stored_names(tensors: Tensors, plain: Callable[[str], str], where: PathLike) -> dict[str, str]:
    """Returns the names in the file `where` by `plain` of them: what a table calls them.

    Raises:
        UserError: two names mean one tensor.
    """
    stored: dict[str, str] = {}
    twice = []
    for name in tensors.shapes:
        if (own := stored.setdefault(plain(name), name)) != name:
            twice.append(f"{own} and {name}")
    complain(where, "tensors stand there under several names", twice=twice)
    return stored


def read_table(
    tensors: Tensors,
    table: Mapping[str, Row],
    *,
    where: epath.Path,
    what: str,
    asks: str,
    names: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
) -> dict[str, np.ndarray | Leaf]:
    """Reads the arrays of a table of names.

    Args:
        tensors: the file's.
        table: our paths; every name of it must be in the file.
        where: what messages call the file.
        what: what is wrong where the tensors do not fit, in words.
        asks: who asks for the shapes.
        names: names in the file by those of the table (`stored_names`). None: they are the same.
        ignored: names, as the table has them, that may be there and are not read.

    Raises:
        UserError: a tensor is missing, unknown or of the wrong shape.
    """
    stored = {name: name for name in tensors.shapes} if names is None else names
    expected = {name: row.shape for row in table.values() for name in row.names}
    complain(
        where,
        what,
        missing=[name for name in expected if name not in stored],
        unknown=[own for name, own in stored.items() if name not in expected and name not in ignored],
        shapes=wrong_shapes({name: tensors.shapes[own] for name, own in stored.items()}, expected, asks),
        types=wrong_types({own: tensors.types[own] for name, own in stored.items() if name in expected}),
    )

    read = ReadTensor(tensors, stored)
    return {path: row.array(row.names, read) for path, row in table.items()}


def complain(
    where: PathLike,
    what: str,
    missing: Sequence[str] = (),
    unknown: Sequence[str] = (),
    shapes: Sequence[str] = (),
    twice: Sequence[str] = (),
    types: Sequence[str] = (),
) -> None:
    """Raises `UserError` that counts the tensors of each kind and names the first of them; returns if there are none.

    Args:
        where: the file or folder.
        what: what is wrong, in words.
        missing: names that should be there.
        unknown: names that mean nothing here.
        shapes: names of the wrong shape, with both shapes.
        twice: names that mean the same tensor.
        types: names whose type is no weight's, with the type.
    """
    problems = [
        f"{len(found)} {word}: {', '.join(found[:_NAMED])}{', …' if len(found) > _NAMED else ''}"
        for word, found in (
            ("missing", missing),
            ("unknown", unknown),
            ("of the wrong shape", shapes),
            ("given twice", twice),
            (f"of a type that is none of {', '.join(READ_TYPES)}", types),
        )
        if found
    ]
    if problems:
        raise UserError(f"{where}: {what}; " + "; ".join(problems))


def wrong_types(found: Mapping[str, str]) -> list[str]:
    """Returns a line for every tensor whose type is none of `READ_TYPES`; `found` has types by name."""
    return [f"{name} is {kind}" for name, kind in found.items() if kind not in READ_TYPES]


def wrong_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], source: str) -> list[str]:
    """Returns a line for every tensor that is in both and differs; `source` says who asks for the shape."""
    return [
        f"{name} is {shape}, {source} asks for {expected[name]}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
