"""A state dict in one file: safetensors, npz, or torch's own. No free pickles."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from mole_jax.errors import UserError
from mole_jax.weights.safetensors_io import TensorFolder
from mole_jax.weights.torch_file import TorchFile

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)


class StateDict(NamedTuple):
    """The tensors of one file."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every tensor by name."""
    read: Callable[[str], np.ndarray]
    """Returns a tensor."""
    metadata: Mapping[str, str]
    """The header's own entries; empty where the format has none."""


def open_state_dict(path: Path) -> StateDict:
    """Opens a file by its suffix (`SUFFIXES`).

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
