"""A Hugging Face folder: opened, read by slices straight into shardings, and our arrays as its tensors.

A folder is ``config.json`` beside ``model.safetensors``, or beside several files and
``model.safetensors.index.json``. Names and configs are in `mole_jax.families`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from numpy.typing import DTypeLike

from mole_jax.errors import UserError
from mole_jax.families import family_of
from mole_jax.families.shared.names import LeafSpec
from mole_jax.files import PathLike
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.foreign import complain, typed_leaf, wrong_types
from mole_jax.weights.hf_config import CONFIG, open_architecture
from mole_jax.weights.leaf import Leaf, Leaves, as_leaf, tensor, widest
from mole_jax.weights.names import leaf_specs
from mole_jax.weights.safetensors_io import TensorFolder, tensor_files

_PIECE = 1 << 24  # bytes
_THREADS = 2 * min(8, os.cpu_count() or 1)  # one reads while another copies
_ROWS = 16


class HfCheckpoint:
    """An opened folder: every tensor is accounted for, none is read yet.

    Attributes:
        folder: the local folder.
        folders: it, and the vision tower's where that is apart.
        architecture: what its config.json says.
        left_out: names of tensors that compute nothing of the model, such as a SigLIP's pooling head.
    """

    def __init__(
        self,
        folder: epath.Path,
        architecture: LlavaArchitecture,
        tensors: TensorFolder,
        *apart: epath.Path,
        projector: bool = True,
    ):
        self.folder, self.folders = folder, (folder, *apart)
        self.architecture = architecture
        self._specs = {
            path: spec
            for path, spec in leaf_specs(architecture).items()
            if projector or not path.startswith("projector/")
        }
        self._tensors = tensors
        self._stored = _account(folder, architecture, self._specs, tensors)
        family = family_of(architecture)
        self.left_out = tuple(name for name in tensors.shapes if family.unused(family.canonical(name)))

    @classmethod
    def open(cls, folder: PathLike) -> HfCheckpoint:
        """Opens a folder, or a hub name such as ``llava-hf/llava-1.5-7b-hf``.

        Raises:
            UserError: no such folder or hub name, a file is missing or cut off, the model is not supported, or a tensor
                is missing, unknown or of the wrong shape.
        """
        local = resolve(folder)
        return cls(local, open_architecture(local), TensorFolder(tensor_files(local)))

    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every leaf, by path."""
        return {path: spec.shape for path, spec in self._specs.items()}

    def leaf(self, path: str) -> Leaf:
        """Returns a leaf to be read layer by layer, in the types in which it is stored."""
        spec = self._specs[path]

        def read(layer: int) -> np.ndarray:
            name = spec.names[layer]
            return spec.ours(self._tensors.read(self._stored[name]))

        return typed_leaf(spec, self._dtypes(spec), read)

    def _dtypes(self, spec: LeafSpec) -> list[np.dtype]:
        return [np.dtype(self._tensors.types[self._stored[name]]) for name in spec.names]

    def read(self, path: str, index: Sequence[slice] | None = None, dtype: DTypeLike | None = None) -> np.ndarray:
        """Reads a slice of a leaf. Fit for the callback of `jax.make_array_from_callback`.

        Only the bytes asked for are read, by several threads: the host holds the slice once, and of each thread a
        piece of at most `_PIECE` bytes.

        Args:
            path: the leaf, as in `leaf_shapes`.
            index: one slice of step 1 for each axis of the leaf. None: all of it.
            dtype: type to return. None: as stored; a type that holds them all where layers differ.

        Returns:
            The slice, contiguous.
        """
        spec = self._specs[path]
        index = (slice(None),) * len(spec.shape) if index is None else tuple(index)
        bounds = [one.indices(size) for one, size in zip(index, spec.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"{path}: slices with steps are not read")
        ranges = [slice(start, max(start, stop)) for start, stop, _ in bounds]
        dtype = widest(self._dtypes(spec)) if dtype is None else dtype
        out = np.empty([one.stop - one.start for one in ranges], dtype)
        names, layers, ours = [spec.names[0]], out[None], ranges
        if spec.stacked:
            names, layers, ours = spec.names[ranges[0]], out, ranges[1:]
        rows, *rest = (ours[axis] for axis in spec.inverse)
        each = math.prod(one.stop - one.start for one in rest) * max(one.itemsize for one in self._dtypes(spec))
        step = max(1, _PIECE // max(each, 1))
        pieces = [
            (name, layer.transpose(spec.inverse), start)
            for name, layer in zip(names, layers, strict=True)
            for start in range(rows.start, rows.stop, step)
        ]

        def fill(name: str, layer: np.ndarray, start: int) -> None:
            stop = min(start + step, rows.stop)
            index = (slice(0, 1),) * spec.ones + (slice(start, stop), *rest)
            piece = self._tensors.read(self._stored[name], index)
            _copy(piece.reshape(piece.shape[spec.ones :]), layer[start - rows.start : stop - rows.start])

        if len(pieces) < 2:
            for piece in pieces:
                fill(*piece)
            return out
        with ThreadPoolExecutor(min(_THREADS, len(pieces))) as pool:
            for done in [pool.submit(fill, *piece) for piece in pieces]:
                done.result()
        return out


def _copy(given: np.ndarray, into: np.ndarray) -> None:
    """Copies an array into one of any strides."""
    if given.dtype == into.dtype:  # as whole numbers, or numpy holds Python's lock for what it does not know (bfloat16)
        given, into = (one.view(f"u{one.itemsize}") for one in (given, into))
    # A few rows at a time: a transposed copy in one go misses the processor's cache at every number.
    for start in range(0, len(given), _ROWS):
        into[start : start + _ROWS] = given[start : start + _ROWS]


def _account(
    folder: epath.Path, arch: LlavaArchitecture, specs: Mapping[str, LeafSpec], tensors: TensorFolder
) -> dict[str, str]:
    """Maps canonical names to the names in the files, or says all that is wrong with the keys in one line."""
    expected = {name: spec.foreign_shape for spec in specs.values() for name in spec.names}
    family, stored = family_of(arch), dict[str, str]()
    unknown, twice, shapes, types = [], [], [], {}
    for name, shape in tensors.shapes.items():
        key = family.canonical(name)
        if family.ignores(key, arch):
            continue
        if key not in expected:
            unknown.append(name)
        elif key in stored:
            twice.append(f"{name} and {stored[key]}")
        else:
            stored[key], types[name] = name, tensors.types[name]
            if shape != expected[key]:
                shapes.append(f"{name} is {shape}, the config asks for {expected[key]}")
    missing = [name for name in expected if name not in stored]
    complain(
        folder,
        f"tensors do not fit {CONFIG}",
        missing=missing,
        unknown=unknown,
        shapes=shapes,
        twice=twice,
        types=wrong_types(types),
    )
    return stored


def resolve(name: PathLike) -> epath.Path:
    """Returns the local folder of a checkpoint: `name` itself, or a hub repository's files, downloaded or cached.

    Raises:
        UserError: neither a folder nor a name that the hub gives.
    """
    folder = epath.Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise UserError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download  # a second to import, and only needed here

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
        local = epath.Path(snapshot_download(str(name), allow_patterns=patterns))
        if not any(local.glob("*.safetensors")):
            local = epath.Path(snapshot_download(str(name), allow_patterns=["pytorch_model*.bin"]))
        return local
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{name}: no such folder here, and as a hub name it cannot be loaded ({reason})") from None


def content_hash(folder: PathLike) -> str:
    """Returns the SHA-256 (hex) of config.json and of the tensor files in order of their names.

    Adapters name the base that they belong to by it.
    """
    folder = epath.Path(folder)
    digest = hashlib.sha256()
    for file in (folder / CONFIG, *tensor_files(folder)):
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        # The length keeps apart two files whose bytes are split differently.
        digest.update(f"{file.stat().length}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def foreign_tensors(specs: Mapping[str, LeafSpec], leaves: Leaves) -> dict[str, Leaf]:
    """Returns every foreign tensor by canonical name, in the order of `specs` and in the type of its leaf's layer."""
    tensors = {}
    for path, spec in specs.items():
        leaf = as_leaf(path, leaves[path])
        if leaf.shape != spec.shape:
            raise ValueError(f"leaf {path} has shape {leaf.shape}, expected {spec.shape}")
        for layer, name in enumerate(spec.names):

            def read(leaf: Leaf = leaf, spec: LeafSpec = spec, layer: int = layer) -> np.ndarray:
                return spec.theirs(leaf[layer] if spec.stacked else np.asarray(leaf))

            tensors[name] = tensor(spec.foreign_shape, leaf.dtype_of(layer), read)
    return tensors
