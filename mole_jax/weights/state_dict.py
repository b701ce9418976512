"""A state dict in one file: safetensors, npz, or torch's own where torch is installed. No free pickles."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from mole_jax.errors import UserError
from mole_jax.weights.safetensors_io import TensorFolder

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
        UserError: the file is damaged, or it is torch's and torch is not installed.
    """
    if path.suffix == ".safetensors":
        files = TensorFolder((path,))
        with safe_open(str(path), framework="numpy") as handle:
            return StateDict(files.shapes, files.read, handle.metadata() or {})
    tensors = _npz(path) if path.suffix == ".npz" else _torch(path)
    return StateDict({name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__, {})


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as npz ({error})") from None


def _torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]  optional: nothing else here needs it
    except ImportError:
        raise UserError(
            f"{path}: reading a {path.suffix} file needs torch; install it, or save the state dict as .safetensors "
            "where torch is and give that file"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its reader or the file's content makes it
        raise UserError(f"{path}: cannot be read as weights alone ({str(error).splitlines()[0]})") from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(one, torch.Tensor) for one in tensors.values()):
        raise UserError(f"{path}: holds no state dict of tensors, on top or under 'state_dict'")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}
