"""Tensor files: slices read out of one or many, a state dict in one of any kind, and safetensors written.

Written are safetensors; a folder that has none is read from PyTorch's own files. No free pickles.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mole_jax.errors import UserError
from mole_jax.files import read_json, write_json
from mole_jax.weights.torch_file import TorchFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
STATE_DICT_SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)

Shape = tuple[int, ...]
_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # all that is written, as numpy and the format say


def tensor_files(folder: Path) -> tuple[Path, ...]:
    """Returns the tensor files of a checkpoint folder, by name.

    Raises:
        UserError: there are none, or the index names a file that is not there.
    """
    for single, listing in ((SINGLE, INDEX), (TORCH_SINGLE, TORCH_INDEX)):
        if (folder / listing).is_file():
            index = read_json(folder / listing).get("weight_map")
            if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
                raise UserError(f"{folder / listing}: has no 'weight_map' of tensor names to file names")
            # A name with a folder in it could lead out of the checkpoint.
            files = tuple(folder / Path(name).name for name in sorted(set(index.values())))
            for file in files:
                if not file.is_file():
                    raise UserError(f"{file}: missing, though {listing} names it; download the checkpoint again")
            return files
        if (folder / single).is_file():
            return (folder / single,)
    raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX} (nor {TORCH_SINGLE})")


class TensorFolder:
    """The tensors of one or many files; values are read when asked for.

    Attributes:
        files: the files, by name.
        shapes: shape of every tensor, by the name in the file.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = tuple(files)
        self.shapes: dict[str, Shape] = {}
        self._file_of: dict[str, _SafetensorsFile | TorchFile] = {}
        for path in self.files:
            file = _SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
            for name, shape in file.shapes.items():
                if name in self._file_of:
                    raise UserError(f"{path}: tensor '{name}' is also in another file of the folder")
                self.shapes[name], self._file_of[name] = shape, file

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the slice `index` of a tensor in its stored type; () is the whole tensor. Steps must be 1."""
        return self._file_of[name].read(name, index)


class _SafetensorsFile:
    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(str(path), framework="numpy") as handle:
                self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); download it again") from None

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        # Opened for each read: an open file stays mapped, and what was read of it counts as this process's memory.
        with safe_open(str(self.path), framework="numpy") as handle:
            return handle.get_slice(name)[index] if index else handle.get_tensor(name)


@dataclasses.dataclass(frozen=True)
class StateDict:
    """The tensors of one file."""

    shapes: Mapping[str, Shape]
    """Shape of every tensor by name."""
    read: Callable[[str], np.ndarray]
    """Returns a tensor."""
    metadata: Mapping[str, str]
    """The header's own entries; empty where the format has none."""


def open_state_dict(path: Path) -> StateDict:
    """Opens a file by its suffix (`STATE_DICT_SUFFIXES`).

    Raises:
        UserError: the file is damaged, or it is torch's and holds more than tensors.
    """
    if path.suffix == ".safetensors":
        files = TensorFolder((path,))
        with safe_open(str(path), framework="numpy") as handle:
            return StateDict(files.shapes, files.read, handle.metadata() or {})
    if path.suffix in TORCH_SUFFIXES:
        file = TorchFile(path)
        return StateDict(file.shapes, file.read, {})
    tensors = _npz(path)
    return StateDict({name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__, {})


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as npz ({error})") from None


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int,
) -> None:
    """Writes model.safetensors, or several files of at most `max_shard_bytes` and their index.

    Args:
        folder: existing folder.
        shapes: shape of every tensor, in the order in which `tensors` yields them. Known ahead, because a file's name
            says how many files there are, and each begins with what it holds.
        dtype: type of all of them.
        tensors: (name, value) pairs; one is held at a time.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    many = len(shards) > 1
    source = iter(tensors)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE
        held = {name: (shapes[name], dtype) for name in names}
        write_file(folder / file, held, itertools.islice(source, len(names)), {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if many:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index, indent=2)


def write_file(
    path: Path,
    declared: Mapping[str, tuple[Shape, np.dtype]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes one safetensors file, a tensor at a time; the library's own writer wants all of them at once.

    Args:
        path: the file.
        declared: shape and type of every tensor, in the order in which `tensors` yields them. Types of more bytes come
            first, or what follows them is not aligned.
        tensors: (name, value) pairs; one is held at a time.
        metadata: the header's own entries.

    Source: the format's description, safetensors 0.8 (eight bytes of header length, the header, the bytes).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (shape, dtype) in declared.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for (name, value), (expected, form) in zip(tensors, declared.items(), strict=True):
            if (name, value.shape, value.dtype) != (expected, *form):
                raise ValueError(f"{name} {value.shape} {value.dtype} came where {expected} {form} was declared")
            # As bytes, because numpy's buffers have no bfloat16.
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
