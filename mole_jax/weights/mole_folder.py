"""This project's own adapter folder: what a run trained and what it says about itself, without its base.

``adapter_config.json`` is the checkpoint's `mole_jax.weights.run.Meta` (architecture, ranks, targets, router setting,
prompt preset, image preparation, base and its hash) with ``"peft_type": "MOLE_JAX"``, so that PEFT refuses it by name.
``adapter_model.safetensors`` has our arrays as they are, layers stacked, "." for "/" in their paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from mole_jax.errors import UserError
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.accounts import complain
from mole_jax.weights.foreign import AdapterFile
from mole_jax.weights.run import Meta
from mole_jax.weights.safetensors_io import TensorFolder, read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KIND = {"peft_type": "MOLE_JAX"}
# What a run may change in its base's architecture (`mole_jax.weights.source.open_base`).
CHANGES = ("feature_layer", "feature_select", "image_vectors")


def is_mole(folder: Path) -> bool:
    """Tells whether `folder` is one of these."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("peft_type") == KIND["peft_type"]


def mole_base(folder: Path) -> str | None:
    """Returns the base that the adapters were trained on."""
    return read_json(folder / CONFIG).get("base")


def write_mole(folder: str | Path, meta: Meta, leaves: Mapping[str, np.ndarray], dtype: DTypeLike = np.float32) -> None:
    """Writes what was trained.

    Args:
        folder: made if it is not there.
        meta: what it says about itself; its base is the one that the adapters stand on.
        leaves: the arrays of the groups ``meta.trained``, by path.
        dtype: type of the written tensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {path.replace("/", "."): np.ascontiguousarray(leaf, dtype=dtype) for path, leaf in leaves.items()}
    save_file(tensors, str(folder / TENSORS), metadata={"format": "np"})
    (folder / CONFIG).write_text(json.dumps(KIND | meta.to_json(), indent=2) + "\n", encoding="utf-8")


def read_mole(folder: Path, arch: LlavaArchitecture) -> AdapterFile:
    """Reads adapters; `arch` is the base's.

    Raises:
        UserError: the folder is of another version, or its tensors and its config do not fit together.
    """
    where = folder / CONFIG
    values = {key: value for key, value in read_json(where).items() if key not in KIND}
    meta = Meta.from_json(values, where=str(where))
    if not (folder / TENSORS).is_file():
        raise UserError(f"{folder / TENSORS}: no such file; copy the whole folder")
    files = TensorFolder((folder / TENSORS,))
    expected = _expected(meta)
    found = {name.replace(".", "/"): shape for name, shape in files.shapes.items()}
    complain(
        folder / TENSORS,
        f"tensors do not fit {CONFIG}",
        missing=[path for path in expected if path not in found],
        unknown=[path for path in found if path not in expected],
        shapes=[
            f"{path} is {found[path]}, {CONFIG} asks for {shape}"
            for path, shape in expected.items()
            if path in found and found[path] != shape
        ],
    )
    return AdapterFile(
        adapter=meta.adapter,
        arrays={path: files.read(path.replace("/", ".")) for path in expected},
        trained=meta.trained,
        changes={name: getattr(meta.architecture, name) for name in CHANGES},
        prompt=meta.prompt,
        image_aspect=meta.image_aspect,
        base_hash=meta.base_hash,
    )


def _expected(meta: Meta) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays that `meta` says were trained, by path."""
    from mole_jax.parameters import group_of
    from mole_jax.training.state import ModelSpec  # which imports the sources of weights

    declarations = ModelSpec.of(meta.architecture, meta.adapter).declarations
    return {
        path: tuple(parameter.shape) for path, parameter in declarations.items() if group_of(parameter) in meta.trained
    }
