"""Hugging Face LLaVA folders: opened, read by slices straight into shardings, written.

A folder is ``config.json`` beside ``model.safetensors``, or beside several files and
``model.safetensors.index.json``. Names are in `mole_jax.weights.names`, the config in `mole_jax.weights.hf_config`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.errors import UserError
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.accounts import complain
from mole_jax.weights.hf_config import architecture_from_hf, architecture_to_hf
from mole_jax.weights.names import LeafSpec, canonical, ignored, leaf_specs
from mole_jax.weights.safetensors_io import TensorFolder, read_json, tensor_files, write_tensors

__all__ = ["HfCheckpoint", "architecture_from_hf", "architecture_to_hf", "content_hash", "resolve", "write_hf"]

Leaves = Callable[[str], np.ndarray] | Mapping[str, np.ndarray]

CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)


class HfCheckpoint:
    """An opened LLaVA folder: every tensor is accounted for, none is read yet.

    Attributes:
        folder: the local folder.
        architecture: what its config.json says.
    """

    def __init__(self, folder: Path, architecture: LlavaArchitecture, tensors: TensorFolder):
        self.folder = folder
        self.architecture = architecture
        self._specs = leaf_specs(architecture)
        self._tensors = tensors
        self._stored = _account(folder, architecture, self._specs, tensors)

    @classmethod
    def open(cls, folder: str | Path) -> HfCheckpoint:
        """Opens a folder, or a hub name such as ``llava-hf/llava-1.5-7b-hf``.

        Raises:
            UserError: no such folder or hub name, a file is missing or cut off, the model is not supported, or a tensor
                is missing, unknown or of the wrong shape.
        """
        local = resolve(folder)
        architecture = architecture_from_hf(read_json(local / CONFIG), where=str(local / CONFIG))
        return cls(local, architecture, TensorFolder(tensor_files(local)))

    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every leaf, by path."""
        return {path: spec.shape for path, spec in self._specs.items()}

    def read(self, path: str, index: Sequence[slice] | None = None, dtype: DTypeLike | None = None) -> np.ndarray:
        """Reads a slice of a leaf. Fit for the callback of `jax.make_array_from_callback`.

        Only the bytes asked for are read, one layer's tensor at a time: the host holds the slice once, and a layer's
        share of it.

        Args:
            path: the leaf, as in `leaf_shapes`.
            index: one slice of step 1 for each axis of the leaf. None: all of it.
            dtype: type to return. None: as stored.

        Returns:
            The slice, contiguous.
        """
        spec = self._specs[path]
        index = (slice(None),) * len(spec.shape) if index is None else tuple(index)
        bounds = [one.indices(size) for one, size in zip(index, spec.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"{path}: slices with steps are not read")
        ranges = [slice(start, max(start, stop)) for start, stop, _ in bounds]
        names = spec.names
        if not spec.stacked:
            return np.ascontiguousarray(self._piece(names[0], spec, ranges), dtype=dtype)
        names = names[ranges[0]]
        shape = (len(names), *(one.stop - one.start for one in ranges[1:]))
        out = None if dtype is None else np.empty(shape, dtype)
        for layer, name in enumerate(names):
            piece = self._piece(name, spec, ranges[1:])
            out = np.empty(shape, piece.dtype) if out is None else out
            out[layer] = piece
        return np.empty(shape, np.float32) if out is None else out

    def _piece(self, name: str, spec: LeafSpec, ours: Sequence[slice]) -> np.ndarray:
        foreign = tuple(ours[axis] for axis in spec.inverse)
        return self._tensors.read(self._stored[name], foreign).transpose(spec.permutation)


def _account(
    folder: Path, arch: LlavaArchitecture, specs: Mapping[str, LeafSpec], tensors: TensorFolder
) -> dict[str, str]:
    """Maps canonical names to the names in the files, or says all that is wrong with the keys in one line."""
    expected = {name: spec.foreign_shape for spec in specs.values() for name in spec.names}
    stored: dict[str, str] = {}
    unknown, twice, shapes = [], [], []
    for name, shape in tensors.shapes.items():
        key = canonical(name)
        if ignored(key, arch):
            continue
        if key not in expected:
            unknown.append(name)
        elif key in stored:
            twice.append(f"{name} and {stored[key]}")
        else:
            stored[key] = name
            if shape != expected[key]:
                shapes.append(f"{name} is {shape}, the config asks for {expected[key]}")
    missing = [name for name in expected if name not in stored]
    complain(folder, f"tensors do not fit {CONFIG}", missing, unknown, shapes, twice)
    return stored


def resolve(name: str | Path) -> Path:
    """Returns the local folder of a checkpoint: `name` itself, or a hub repository's files, downloaded or cached.

    Raises:
        UserError: neither a folder nor a name that the hub gives.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise UserError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download  # a second to import, and only needed here

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{name}: no such folder here, and as a hub name it cannot be loaded ({reason})") from None


def content_hash(folder: str | Path) -> str:
    """Returns the SHA-256 (hex) of config.json and of the tensor files in order of their names.

    Adapters name the base that they belong to by it.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for file in (folder / CONFIG, *tensor_files(folder)):
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        # The length keeps apart two files whose bytes are split differently.
        digest.update(f"{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def write_hf(
    folder: str | Path,
    arch: LlavaArchitecture,
    leaves: Leaves,
    dtype: DTypeLike = ml_dtypes.bfloat16,
    *,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: str | Path | None = None,
) -> None:
    """Writes a folder that transformers 5 loads, in the hub's legacy key layout.

    Args:
        folder: made if it is not there.
        arch: the model.
        leaves: array of each path of `leaf_specs(arch)`, in a dict or by a function that is called once a path. One
            leaf and one file's worth of tensors are held at a time.
        dtype: type of the written weights.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.
        tokenizer: folder whose tokenizer files are copied along. None: none are.

    Raises:
        UserError: `arch` has image vectors, or `tokenizer` has no tokenizer.
    """
    dtype = np.dtype(dtype)
    config = architecture_to_hf(arch, dtype.name)
    specs = leaf_specs(arch)
    sizes = tensor_sizes(specs.values(), dtype)
    tensors = foreign_tensors(specs, leaves, dtype)
    write_folder(folder, config, arch, sizes, tensors, max_shard_bytes=max_shard_bytes, tokenizer=tokenizer)


def write_folder(
    folder: str | Path,
    config: dict,
    arch: LlavaArchitecture,
    sizes: Mapping[str, int],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: str | Path | None = None,
) -> None:
    """Writes tensors and all the small files that stand beside them; `sizes` and `tensors` as in `write_tensors`.

    Raises:
        UserError: `tokenizer` has no tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, sizes, tensors, max_shard_bytes)
    _copy_tokenizer(folder, tokenizer)
    _write_json(folder / "generation_config.json", _generation(arch))
    _write_json(folder / "preprocessor_config.json", _preprocessor(arch))
    _write_json(folder / "processor_config.json", _processor(arch))
    _write_json(folder / CONFIG, config)  # last: a folder without it is seen to be unfinished


def tensor_sizes(specs: Iterable[LeafSpec], dtype: np.dtype) -> dict[str, int]:
    """Returns the bytes of every foreign tensor of `specs`, by canonical name."""
    return {name: math.prod(spec.foreign_shape) * dtype.itemsize for spec in specs for name in spec.names}


def foreign_tensors(specs: Mapping[str, LeafSpec], leaves: Leaves, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Yields canonical name and value of every foreign tensor, in the order of `specs`; one leaf is held at a time."""
    get = leaves.__getitem__ if isinstance(leaves, Mapping) else leaves
    for path, spec in specs.items():
        value = np.asarray(get(path))
        if value.shape != spec.shape:
            raise ValueError(f"leaf {path} has shape {value.shape}, expected {spec.shape}")
        layers = value if spec.stacked else value[None]
        for name, layer in zip(spec.names, layers, strict=True):
            yield name, np.ascontiguousarray(layer.transpose(spec.inverse), dtype=dtype)


def _copy_tokenizer(folder: Path, source: str | Path | None) -> None:
    if source is None:
        return
    found = [Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    if not {"tokenizer.model", "tokenizer.json"} & {file.name for file in found}:
        raise UserError(f"{source}: holds neither tokenizer.model nor tokenizer.json")
    for file in found:
        shutil.copyfile(file, folder / file.name)


def _generation(arch: LlavaArchitecture) -> dict:
    decoder = arch.decoder
    return {"bos_token_id": decoder.bos_id, "eos_token_id": decoder.eos_id, "pad_token_id": decoder.pad_id}


def _preprocessor(arch: LlavaArchitecture) -> dict:
    side = arch.vision.image_size
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,  # to a square, with the mean colour, as LLaVA-1.5 trains; transformers' default is off
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "LlavaImageProcessor",
        "image_std": list(CLIP_STD),
        "processor_class": "LlavaProcessor",
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }


def _processor(arch: LlavaArchitecture) -> dict:
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # the class token, which the strategy "default" takes off again
        "patch_size": arch.vision.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "full" if arch.feature_select == "full" else "default",
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
