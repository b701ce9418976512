"""Files as ``torch.save`` writes them, without torch; `test_torch_file.py` reads some that torch wrote itself."""

from __future__ import annotations

import collections
import pickle
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def torch_save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a state dict. The pickle only names torch's classes, so empty ones of those names stand in for them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        pass

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils.__dict__["_rebuild_tensor_v2"] = _rebuild_tensor_v2
    storages: list[np.ndarray] = []

    class Storage:
        def __init__(self, value: np.ndarray):
            self.value, self.key = value, str(len(storages))
            storages.append(value)

    class Tensor:
        def __init__(self, value: np.ndarray):
            self.value = np.ascontiguousarray(value)

        def __reduce__(self):
            strides = tuple(step // self.value.itemsize for step in self.value.strides)
            rest = (0, self.value.shape, strides, False, collections.OrderedDict())
            return _rebuild_tensor_v2, (Storage(self.value), *rest)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                kind = getattr(torch, STORAGES[obj.value.dtype.name])
                return ("storage", kind, obj.key, "cpu", obj.value.size)
            return None

    with zipfile.ZipFile(path, "w") as archive, mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        with archive.open(f"{path.stem}/data.pkl", "w") as stream:
            Pickler(stream, protocol=2).dump(collections.OrderedDict((k, Tensor(v)) for k, v in tensors.items()))
        for key, value in enumerate(storages):
            archive.writestr(f"{path.stem}/data/{key}", value.tobytes())
