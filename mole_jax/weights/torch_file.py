"""What ``torch.save`` wrote, read without PyTorch: tensors alone, and nothing in the file is run.

The file is an uncompressed zip: ``NAME/data.pkl`` is a pickle of the object, in which a tensor is a call of
``torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, …)``, and ``NAME/data/KEY`` are the storages' bytes.
Like ``torch.load(weights_only=True)`` the unpickler knows the few names that tensors in dicts need, and refuses the
rest. Values stay in the file until they are read.

Source: pytorch, ``torch/serialization.py`` (format of 1.6 and later) and ``torch/_weights_only_unpickler.py``.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mole_jax.errors import UserError

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
_LOCAL_HEADER = 30  # bytes of a zip entry's own header before its name


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
    """

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
                with archive.open(pickled) as stream:
                    content = _Unpickler(stream).load()
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(
                f"{path}: no whole file of torch 1.6 or later ({error}); download or save it again"
            ) from None
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: cannot be read as weights alone ({error})") from None
        except Exception as error:  # a damaged pickle raises whatever its opcodes run into
            raise UserError(f"{path}: cannot be read as weights alone ({type(error).__name__}: {error})") from None
        tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
        if not tensors or not all(isinstance(one, Tensor) for one in tensors.values()):
            raise UserError(f"{path}: holds no state dict of tensors, on top or under 'state_dict'")
        self._tensors: dict[str, Tensor] = dict(tensors)
        self.shapes = {name: one.shape for name, one in self._tensors.items()}

    def _check(self, archive: zipfile.ZipFile) -> None:
        """Notes where the storages lie."""
        self._places: dict[str, tuple[int, int]] = {}
        with self.path.open("rb") as stream:
            for entry in archive.infolist():
                name = entry.filename.removeprefix(self._prefix)
                if name == "byteorder" and archive.read(entry) != b"little":
                    raise ValueError("big-endian")
                if name.startswith("data/"):
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"{entry.filename} is compressed")
                    stream.seek(entry.header_offset + _LOCAL_HEADER - 4)
                    lengths = np.frombuffer(stream.read(4), "<u2")  # of the name, and of the padding behind it
                    start = entry.header_offset + _LOCAL_HEADER + int(lengths.sum())
                    self._places[name.removeprefix("data/")] = start, entry.file_size

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the slice `index` of a tensor in its stored type; () is the whole tensor.

        Raises:
            UserError: the file's description reaches outside its bytes.
        """
        one = self._tensors[name]
        start, size = self._places.get(one.storage.key, (0, 0))
        item = one.storage.dtype.itemsize
        reach = one.offset + sum((n - 1) * step for n, step in zip(one.shape, one.stride, strict=True)) + 1
        if math.prod(one.shape) == 0:
            return np.zeros(one.shape, one.storage.dtype)[index]
        if min((one.offset, *one.stride)) < 0 or reach * item > size:
            raise UserError(f"{self.path}: tensor '{name}' reaches beyond its bytes; download the file again")
        # Mapped for each read, so that what was read does not stay this process's memory.
        storage = np.memmap(self.path, one.storage.dtype, "r", start, (size // item,))
        strides = [step * item for step in one.stride]
        return np.array(np.lib.stride_tricks.as_strided(storage[one.offset :], one.shape, strides)[index])


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = (module, name)
        if found == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if found == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: Tensor(storage, offset, tuple(shape), tuple(stride))
        if found == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"it refers to {pid!r}, which is no storage")
        return _Storage(dtype, str(key))
