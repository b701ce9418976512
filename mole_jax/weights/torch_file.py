"""What ``torch.save`` wrote, read without PyTorch: tensors alone, and nothing in the file is run.

The file is an uncompressed zip: ``NAME/data.pkl`` is a pickle of the object, in which a tensor is a call of
``torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, …)``, and ``NAME/data/KEY`` are the storages' bytes.
Like ``torch.load(weights_only=True)`` the unpickler knows the few names that tensors in dicts need, and refuses the
rest. Values stay in the file until they are read.

What the file says of itself is held against its bytes when it is opened: places, sizes, shapes, steps. The pickle is
read once without being executed, because a few bytes of it can ask for any amount of memory.

Source: pytorch, ``torch/serialization.py`` (format of 1.6 and later) and ``torch/_weights_only_unpickler.py``.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mole_jax.errors import UserError
from mole_jax.files import check_no_pointer

_STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAX_AXES = 32
_LOCAL_HEADER = 30  # bytes of a zip entry's own header before its name
MAX_PICKLE_BYTES = 64 << 20
"""Largest ``data.pkl``: names, shapes and places. That of a model of 7B has 100 kB."""


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class Tensor(NamedTuple):
    """A tensor that stays in its file."""

    storage: _Storage
    offset: int
    """Of its first number, in numbers."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In numbers."""


class TorchFile:
    """The state dict of one file: on top, or under ``state_dict``.

    Attributes:
        shapes: shape of every tensor, by name.
        types: type of every tensor as numpy calls it.
        metadata: empty; the format has none.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path):
        """Reads the names.

        Raises:
            UserError: the file is damaged, of a torch before 1.6, holds more than tensors, or no state dict of them.
        """
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                self._prefix = pickled.removesuffix("data.pkl")
                self._check(archive)
                content = _Unpickler(io.BytesIO(_checked_pickle(archive, pickled))).load()
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            check_no_pointer(path)
            raise UserError(
                f"{path}: no whole file of torch 1.6 or later ({_first_line(error)}); download or save it again"
            ) from None
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: cannot be read as weights alone ({_first_line(error)})") from None
        except Exception as error:  # a damaged pickle raises whatever its opcodes run into
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise UserError(f"{path}: cannot be read as weights alone ({reason})") from None
        tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
        if not isinstance(tensors, dict) or not tensors or not all(isinstance(one, Tensor) for one in tensors.values()):
            raise UserError(f"{path}: holds no state dict of tensors, on top or under 'state_dict'")
        if not all(isinstance(name, str) for name in tensors):
            raise UserError(f"{path}: has tensors whose names are no text, so it is no state dict")
        self._tensors: dict[str, Tensor] = dict(tensors)
        for name, one in self._tensors.items():
            self._check_bounds(name, one)
        self.shapes = {name: one.shape for name, one in self._tensors.items()}
        self.types = {name: one.storage.dtype.name for name, one in self._tensors.items()}

    def _check(self, archive: zipfile.ZipFile) -> None:
        """Notes where the storages lie."""
        self._places: dict[str, tuple[int, int]] = {}
        whole = self.path.stat().st_size
        with self.path.open("rb") as stream:
            for entry in archive.infolist():
                name = entry.filename.removeprefix(self._prefix)
                if name == "byteorder" and (entry.file_size > len("little") or archive.read(entry) != b"little"):
                    raise ValueError("big-endian")
                if name.startswith("data/"):
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"{entry.filename} is compressed")
                    stream.seek(entry.header_offset + _LOCAL_HEADER - 4)
                    lengths = np.frombuffer(stream.read(4), "<u2")  # of the name, and of the padding behind it
                    start = entry.header_offset + _LOCAL_HEADER + int(lengths.sum())
                    if start + entry.file_size > whole:
                        raise ValueError(f"{entry.filename} reaches beyond the end of the file")
                    self._places[name.removeprefix("data/")] = start, entry.file_size

    def _check_bounds(self, name: str, one: Tensor) -> None:
        """Raises `UserError` if a tensor is not wholly within its storage, or has more numbers than that."""
        _, size = self._places.get(one.storage.key, (0, 0))
        room = size // one.storage.dtype.itemsize
        reach = one.offset + sum((n - 1) * step for n, step in zip(one.shape, one.stride, strict=True)) + 1
        count = math.prod(one.shape)
        if count and (reach > room or count > room):
            raise UserError(
                f"{self.path}: tensor {name!r} of shape {one.shape} reaches beyond its {room} numbers; "
                "download the file again"
            )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the slice `index` of a tensor in its stored type; () is the whole tensor."""
        one = self._tensors[name]
        start, size = self._places.get(one.storage.key, (0, 0))
        item = one.storage.dtype.itemsize
        if math.prod(one.shape) == 0:
            return np.zeros(one.shape, one.storage.dtype)[index]
        # Mapped for each read, so that what was read does not stay this process's memory.
        storage = np.memmap(self.path, one.storage.dtype, "r", start, (size // item,))
        strides = [step * item for step in one.stride]
        return np.array(np.lib.stride_tricks.as_strided(storage[one.offset :], one.shape, strides)[index])


def _checked_pickle(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns the pickle, which is small, whole, and asks for no more memory than it has bytes.

    Raises:
        ValueError: it is not.
    """
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    if entry.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"{name} has {entry.file_size:,} bytes, the limit is {MAX_PICKLE_BYTES:,}")
    content = archive.read(entry)
    # Sizes are seen to be there while reading; a place in the unpickler's table is a number alone.
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(content):
            raise ValueError(f"{name} asks for place {argument:,} of a table")
    return content


def _rebuilt(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    numbers = (offset, *shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, _Storage) or not all(type(one) is int and one >= 0 for one in numbers):
        raise pickle.UnpicklingError("a tensor's storage, offset, shape or steps are none")
    if len(shape) != len(stride) or len(shape) > _MAX_AXES:
        raise pickle.UnpicklingError(f"a tensor has {len(shape)} axes and {len(stride)} steps")
    return Tensor(storage, offset, shape, stride)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = (module, name)
        if found == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if found == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if found == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        # The reference is not put into messages: an object of a few bytes can have a text without end.
        kind, dtype, key = pid[:3] if isinstance(pid, tuple) and len(pid) >= 3 else (None, None, None)
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return _Storage(dtype, key)
