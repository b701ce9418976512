"""Reading slices out of, and writing, a folder of safetensors files: one, or many behind an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mole_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`; raises `UserError` naming the file if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def tensor_files(folder: Path) -> tuple[Path, ...]:
    """Returns the safetensors files of a checkpoint folder, by name.

    Raises:
        UserError: there are none, or the index names a file that is not there.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{folder / INDEX}: has no 'weight_map' of tensor names to file names")
        # A name with a folder in it could lead out of the checkpoint.
        files = tuple(folder / Path(name).name for name in sorted(set(index.values())))
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: missing, though {INDEX} names it; download the checkpoint again")
        return files
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if any(folder.glob("*.bin")):
        raise UserError(f"{folder}: has .bin files but no {SINGLE}; save the checkpoint as safetensors first")
    raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}")


class TensorFolder:
    """The tensors of one or many safetensors files; values are read when asked for.

    Attributes:
        files: the files, by name.
        shapes: shape of every tensor, by the name in the file.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = tuple(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[str, Any] = {}
        for file in self.files:
            try:
                handle = safe_open(str(file), framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a whole safetensors file ({error}); download it again") from None
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in self._handles:
                    raise UserError(f"{file}: tensor '{name}' is also in another file of the folder")
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                self._handles[name] = handle

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the slice `index` of a tensor in its stored type; () is the whole tensor. Steps must be 1."""
        handle = self._handles[name]
        return handle.get_slice(name)[index] if index else handle.get_tensor(name)


def write_tensors(
    folder: Path, sizes: Mapping[str, int], tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes model.safetensors, or several files of at most `max_shard_bytes` and their index.

    Args:
        folder: existing folder.
        sizes: bytes of every tensor, in the order in which `tensors` yields them. Known ahead, because a file's name
            says how many files there are.
        tensors: (name, value) pairs; at most one file's worth is held at a time.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.
    """
    shards: list[list[str]] = [[]]
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
        held = dict(next(source) for _ in names)
        if list(held) != names:
            raise ValueError("tensors came in another order than their sizes")
        save_file(held, str(folder / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if many:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
