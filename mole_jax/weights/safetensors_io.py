"""Tensor files: slices read out of one or many, a state dict in one of any kind, and safetensors written.

Written are safetensors; a folder that has none is read from PyTorch's own files. No free pickles.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from etils import epath
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open

from mole_jax.errors import UserError
from mole_jax.files import PathLike, check_no_pointer, is_remote, read_json, write_json, writing
from mole_jax.weights.leaf import Leaf
from mole_jax.weights.torch_file import TorchFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
STATE_DICT_SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)

Shape = tuple[int, ...]
_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""All that is written, as numpy and the format say."""
_NAMES = {theirs: ours for ours, theirs in _TYPES.items()} | {"F64": "float64"}
_MAX_HEADER = 100_000_000  # the library's own limit
_PIECE = 1 << 24  # bytes written at a time: a bucket's stream holds them several times over


def tensor_files(folder: PathLike) -> tuple[epath.Path, ...]:
    """Returns the tensor files of a checkpoint folder, by name: safetensors where there are any, else PyTorch's own.

    Raises:
        UserError: there are none, the index names a file that is not there, or there are two sets of them: a single
            file and an index of others. (transformers 5 reads the single file and says nothing. Which of the two is
            stale is the user's to know.)
    """
    folder = epath.Path(folder)
    for single, listing in ((SINGLE, INDEX), (TORCH_SINGLE, TORCH_INDEX)):
        if not (folder / listing).is_file():
            if (folder / single).is_file():
                return (folder / single,)
            continue
        files = _listed(folder, listing)
        if (folder / single).is_file() and files != (folder / single,):
            raise UserError(
                f"{folder}: holds {single} and beside it {listing}, which names {len(files)} other files "
                f"({files[0].name}, …); remove those that are stale (transformers would read {single})"
            )
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: missing, though {listing} names it; download the checkpoint again")
        return files
    raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX} (nor {TORCH_SINGLE})")


def _listed(folder: epath.Path, listing: str) -> tuple[epath.Path, ...]:
    """Returns the files that an index names."""
    index = read_json(folder / listing).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{folder / listing}: has no 'weight_map' of tensor names to file names")
    # A name with a folder in it could lead out of the checkpoint.
    return tuple(folder / Path(name).name for name in sorted(set(index.values())))


class TensorFolder:
    """The tensors of one or many files; values are read when asked for.

    Attributes:
        files: the files, by name.
        shapes: shape of every tensor, by the name in the file.
        types: type of every tensor as numpy calls it, or as the file does where numpy has none.
        metadata: the headers' own entries.
    """

    def __init__(self, files: Iterable[PathLike]):
        self.files = tuple(map(epath.Path, files))
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        self.types: dict[str, str] = {}
        self._file_of: dict[str, _SafetensorsFile | FetchedFile | TorchFile] = {}
        for path in self.files:
            file = _safetensors(path) if path.suffix == ".safetensors" else TorchFile(_on_disk(path))
            self.metadata |= file.metadata
            for name, shape in file.shapes.items():
                if name in self._file_of:
                    raise UserError(f"{path}: tensor '{name}' is also in another file of the folder")
                self.shapes[name], self.types[name], self._file_of[name] = shape, file.types[name], file

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the slice `index` of a tensor in its stored type; () is the whole tensor. Steps must be 1."""
        return self._file_of[name].read(name, index)


class _ByRows(ABC):
    """A safetensors file of whose tensors the rows that are asked for are read, and no more."""

    path: epath.Path
    shapes: dict[str, Shape]
    types: dict[str, str]
    _places: dict[str, int]
    """First byte of every tensor."""

    @abstractmethod
    def _numbers(self, dtype: np.dtype, place: int, count: int) -> np.ndarray:
        """Reads so many numbers from a byte on; fewer where the file ends."""

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        shape, dtype = self.shapes[name], np.dtype(self.types[name])
        start, stop, _ = index[0].indices(shape[0]) if index else (0, shape[0] if shape else 1, 1)
        rows, row = max(stop - start, 0), math.prod(shape[1:])
        found = self._numbers(dtype, self._places[name] + start * row * dtype.itemsize, rows * row)
        if len(found) != rows * row:
            raise UserError(f"{self.path}: has become shorter while it was read; copy it there again")
        whole = found.reshape((rows, *shape[1:]) if shape else ())
        return whole[(slice(None), *index[1:])] if index else whole


class _SafetensorsFile(_ByRows):
    def __init__(self, path: epath.Path):
        self.path = path
        try:
            # The library holds the header against the file: lengths, offsets, shapes.
            with safe_open(str(path), framework="numpy") as handle:
                found = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                self.shapes = {name: tuple(one.get_shape()) for name, one in found.items()}
                self.types = {
                    name: _NAMES.get(str(one.get_dtype()), str(one.get_dtype())) for name, one in found.items()
                }
                self.metadata: Mapping[str, str] = handle.metadata() or {}
            with path.open("rb") as stream:
                begin, header = _header(stream, path.stat().length)
            self._places = {name: begin + header[name]["data_offsets"][0] for name in found}
        except (SafetensorError, OSError, ValueError) as error:
            check_no_pointer(path)
            raise UserError(f"{path}: not a whole safetensors file ({_first_line(error)}); download it again") from None

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        if self.types[name] in _TYPES:
            return super().read(name, index)
        with safe_open(str(self.path), framework="numpy") as handle:
            return handle.get_slice(name)[index] if index else handle.get_tensor(name)

    def _numbers(self, dtype: np.dtype, place: int, count: int) -> np.ndarray:
        # The library maps the file: threads would wait for each other's page faults under Python's lock.
        return np.fromfile(self.path, f"u{dtype.itemsize}", count, offset=place).view(dtype)


class FetchedFile(_ByRows):
    """One in a bucket: the library reads files of a disk alone, so its checks of the header are made here."""

    def __init__(self, path: epath.Path):
        self.path = path
        self.shapes: dict[str, Shape] = {}
        self.types: dict[str, str] = {}
        try:
            with path.open("rb") as stream:
                begin, header = _header(stream, size := path.stat().length)
            self.metadata: Mapping[str, str] = {key: str(one) for key, one in header.pop("__metadata__", {}).items()}
            self._places = {name: begin + one["data_offsets"][0] for name, one in header.items()}
            _check_places(header, size - begin)
            for name, one in header.items():
                self.shapes[name] = tuple(one["shape"])
                self.types[name] = _NAMES.get(one["dtype"]) or str(one["dtype"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            check_no_pointer(path)
            raise UserError(
                f"{path}: not a whole safetensors file ({_first_line(error)}); copy it there again"
            ) from None

    def _numbers(self, dtype: np.dtype, place: int, count: int) -> np.ndarray:
        if not count:
            return np.empty(0, dtype)
        with self.path.open("rb") as stream:
            stream.seek(place)
            content = bytes(stream.read(count * dtype.itemsize))
        return np.frombuffer(content, dtype, len(content) // dtype.itemsize)


def _header(stream: IO[bytes], size: int) -> tuple[int, dict[str, Any]]:
    """Returns the byte of a file of `size` bytes at which the tensors begin, and what is said of them before."""
    length = int.from_bytes(bytes(stream.read(8)), "little")
    if length > _MAX_HEADER or 8 + length > size:
        raise ValueError(f"a header of {length:,} bytes")
    return 8 + length, json.loads(stream.read(length))


def _check_places(header: Mapping[str, Any], room: int) -> None:
    """Raises `ValueError` if the tensors do not fill `room` bytes, one behind the other and each as its shape says."""
    end = 0
    for one in sorted(header.values(), key=lambda one: one["data_offsets"]):
        (start, stop), shape, kind = one["data_offsets"], one["shape"], one["dtype"]
        if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
            raise ValueError("places or shapes that are no numbers")
        size = math.prod(shape) * np.dtype(_NAMES[kind]).itemsize if kind in _NAMES else stop - start
        if start != end or stop - start != size:
            raise ValueError(f"a tensor of shape {shape} from byte {start} to {stop}")
        end = stop
    if end != room:
        raise ValueError(f"{room:,} bytes of tensors, of which the header has {end:,}")


class _NpzFile:
    """Arrays are unpacked when they are read, so that a small file which says it holds a large one costs nothing."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, Shape] = {}
        self.types: dict[str, str] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    with archive.open(entry) as stream:
                        name, header = entry.removesuffix(".npy"), _npy_header(stream)
                        self.shapes[name], self.types[name] = header
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise UserError(f"{path}: cannot be read as npz ({_first_line(error)})") from None

    def read(self, name: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({_first_line(error)})") from None


def _npy_header(stream: IO[bytes]) -> tuple[Shape, str]:
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of npy")
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("holds Python objects")
    return tuple(shape), dtype.name


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class StateDict(Protocol):
    """The tensors of one file."""

    shapes: dict[str, Shape]
    """Shape of every tensor by name."""
    types: dict[str, str]
    """Type of every tensor, as in `TensorFolder`."""
    metadata: Mapping[str, str]
    """The header's own entries; empty where the format has none."""

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        ...


def open_state_dict(path: PathLike) -> StateDict:
    """Opens a file by its suffix (`STATE_DICT_SUFFIXES`).

    Raises:
        UserError: the file is damaged, it is torch's and holds more than tensors, or it is in a bucket and none of
            safetensors'.
    """
    path = epath.Path(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    local = _on_disk(path)
    return TorchFile(local) if path.suffix in TORCH_SUFFIXES else _NpzFile(local)


def _safetensors(path: epath.Path) -> _SafetensorsFile | FetchedFile:
    return FetchedFile(path) if is_remote(path) else _SafetensorsFile(path)


def _on_disk(path: epath.Path) -> Path:
    if is_remote(path):
        raise UserError(f"{path}: of a bucket only safetensors are read; copy the checkpoint to a disk")
    return Path(path)


def write_tensors(folder: epath.Path, tensors: Mapping[str, Leaf], max_shard_bytes: int) -> None:
    """Writes model.safetensors, or several files of at most `max_shard_bytes` and their index.

    Args:
        folder: existing folder, or one of a bucket.
        tensors: what is written, each in its own type; one is held at a time. Those of wider types come first.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: tensors[name].part_bytes for name in _by_width(tensors)}
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    many = len(shards) > 1
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE
        write_file(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if many:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index, indent=2)


def _by_width(tensors: Mapping[str, Leaf]) -> list[str]:
    """Returns the names in the order of a file: what follows a tensor of fewer bytes a number would not be aligned."""
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


def write_file(path: PathLike, tensors: Mapping[str, Leaf], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file, whole or not at all, a tensor at a time.

    The library's own writer wants all of them at once, and a disk.

    Args:
        path: the file.
        tensors: what is written, each in its own type (float32, bfloat16, float16).
        metadata: the header's own entries.

    Raises:
        UserError: it cannot be written.

    Source: the format's description, safetensors 0.8 (eight bytes of header length, the header, the bytes).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in (order := _by_width(tensors)):
        one = tensors[name]
        start, end = end, end + one.size * one.dtype.itemsize
        header[name] = {"dtype": _TYPES[one.dtype.name], "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            value = np.asarray(tensors[name])
            if value.shape != tensors[name].shape:
                raise ValueError(f"{name} came as {value.shape}, {tensors[name].shape} was declared")
            # As bytes, because numpy's buffers have no bfloat16.
            content = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
            for start in range(0, len(content), _PIECE):
                stream.write(content[start : start + _PIECE])
