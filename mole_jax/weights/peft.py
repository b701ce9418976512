"""Plain LoRA as a PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT 0.21).

=================================================================================  ===========  =====================
tensor, after ``base_model.model.``                                                shape        ours
=================================================================================  ===========  =====================
``model.language_model.layers.{layer}.{module}.lora_A.weight``                     (R, D_in)    A (D_in, R), transposed
``model.language_model.layers.{layer}.{module}.lora_B.weight``                     (D_out, R)   B (R, D_out), transposed
``model.multi_modal_projector.linear_{1,2}.{weight,bias}`` (``modules_to_save``)   as in HF     the trained projector
=================================================================================  ===========  =====================

Files of transformers 4 say ``language_model.model.layers``, those of original LLaVA ``model.layers``, with the
projector apart in ``non_lora_trainables.bin`` as ``model.mm_projector.{0,2}``; all are read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.accounts import complain, wrong_shapes
from mole_jax.weights.foreign import MODULES, AdapterFile, target_path
from mole_jax.weights.llava import renamed
from mole_jax.weights.names import LeafSpec, canonical, leaf_specs
from mole_jax.weights.safetensors_io import TensorFolder, read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TORCH_TENSORS = "adapter_model.bin"
PROJECTOR_APART = "non_lora_trainables.bin"
PREFIX = "base_model.model."
LORA = "model.language_model.layers.{layer}.{module}.lora_{side}.weight"
_LORA = re.compile(r"language_model\.model\.layers\.(\d+)\.(?P<module>[\w.]+)\.lora_[AB]\.weight")

PROJECTOR = "multi_modal_projector"
# Settings under which the delta is another formula than (alpha / r) B A x.
_UNSUPPORTED = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
}


def is_peft(folder: Path) -> bool:
    """Tells whether `folder` holds a PEFT adapter of any kind."""
    return (folder / CONFIG).is_file() and "peft_type" in read_json(folder / CONFIG)


def peft_base(folder: Path) -> str | None:
    """Returns the base model that the adapter names, if it names one."""
    return read_json(folder / CONFIG).get("base_model_name_or_path") or None


def check_peft(adapter: AdapterConfig, arch: LlavaArchitecture, *, where: str) -> None:
    """Raises `UserError` with the reason if PEFT has no place for a model with these adapters."""
    if adapter.kind == "mole":
        raise UserError(
            f"{where}: PEFT has no LoRA experts routed token by token; convert it --to mole, or fold one with --expert"
        )
    if adapter.kind != "lora":
        raise UserError(f"{where}: has no LoRA to export (adapter.kind {adapter.kind}); convert it --to hf")
    if arch.image_vectors:
        raise UserError(
            f"{where}: a PEFT adapter has no place for learned image start and end vectors (model.image_vectors); "
            "convert it --to mole"
        )


def write_peft(
    folder: str | Path,
    adapter: AdapterConfig,
    leaves: Mapping[str, np.ndarray],
    arch: LlavaArchitecture,
    *,
    base: str | None,
    where: str,
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes a plain LoRA, and the projector where `leaves` has it, as PEFT does.

    Args:
        folder: made if it is not there.
        adapter: of kind lora.
        leaves: the adapters' arrays by path, and the projector's if it was trained.
        arch: the model.
        base: name or folder of the base, recorded for those who load the adapter.
        where: what messages call the model.
        dtype: type of the written tensors.

    Raises:
        UserError: the adapters are no plain LoRA, or the model has learned image vectors.
    """
    check_peft(adapter, arch, where=where)
    tensors = {}
    for (target, side), names in _lora_names(adapter.targets, arch).items():
        stacked = leaves[f"{target_path(target)}/adapter/{side.lower()}"]
        tensors |= {PREFIX + name: one.T for name, one in zip(names, stacked, strict=True)}
    for path, spec in _projector(arch).items():
        if path in leaves:
            tensors[f"{PREFIX}model.{spec.pattern}"] = leaves[path].transpose(spec.inverse)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with_projector = any(path in leaves for path in _projector(arch))
    # PEFT's own loader asks for torch's mark in the header.
    arrays = {name: np.ascontiguousarray(one, dtype=dtype) for name, one in tensors.items()}
    save_file(arrays, str(folder / TENSORS), metadata={"format": "pt"})
    config = _config(adapter, base, with_projector)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(adapter: AdapterConfig, base: str | None, with_projector: bool) -> dict[str, Any]:
    modules = "|".join(re.escape(MODULES[target]) for target in adapter.targets)
    return {
        "base_model_name_or_path": base or "",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": [PROJECTOR] if with_projector else None,
        "peft_type": "LORA",
        "r": adapter.rank,
        # A pattern, because a list of bare names would also hit the vision tower's projections.
        "target_modules": rf"(.*\.)?language_model\.(.*\.)?layers\.\d+\.({modules})",
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def read_peft(folder: Path, arch: LlavaArchitecture) -> AdapterFile:
    """Reads a LoRA of the language model, with or without a projector.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors or .bin, and whatever original LLaVA put beside.
        arch: the base's.

    Raises:
        UserError: another method than LoRA, a setting under which the delta is not ``(alpha / r) B A x``, or a tensor
            is missing, unknown, of the wrong shape or of another rank than the config says.
    """
    where = folder / CONFIG
    adapter = _settings(read_json(where), where)
    file = next((folder / name for name in (TENSORS, TORCH_TENSORS) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: holds neither {TENSORS} nor {TORCH_TENSORS}; copy the whole folder")
    files = TensorFolder([file, *folder.glob(PROJECTOR_APART)])
    stored = {_canonical(name): name for name in files.shapes}
    modules = {found["module"] for name in stored if (found := _LORA.fullmatch(name))}
    targets = tuple(target for target, module in MODULES.items() if module in modules)
    adapter = dataclasses.replace(adapter, targets=targets)

    lora = {key: [_canonical(name) for name in names] for key, names in _lora_names(targets, arch).items()}
    shapes = {name: files.shapes[own] for name, own in stored.items()}
    # A's first axis alone would do, but a B of another rank is the same mistake.
    ranks = {
        shape[0 if ".lora_A." in name else -1] for name, shape in shapes.items() if _LORA.fullmatch(name) and shape
    }
    if ranks - {adapter.rank}:
        stored_ranks = ", ".join(map(str, sorted(ranks)))
        raise UserError(
            f"{folder}: {CONFIG} says rank (r) {adapter.rank}, the tensors have {stored_ranks}; the two are no pair"
        )
    specs = leaf_specs(arch)
    expected: dict[str, tuple[int, ...]] = {}
    for (target, side), names in lora.items():
        d_out, d_in = specs[target_path(target) + "/kernel"].foreign_shape
        expected |= dict.fromkeys(names, (adapter.rank, d_in) if side == "A" else (d_out, adapter.rank))
    projector = _projector(arch)
    has_projector = any(name.startswith(PROJECTOR) for name in stored)
    if has_projector:
        expected |= {spec.pattern: spec.foreign_shape for spec in projector.values()}
    if not targets:
        raise UserError(f"{file}: holds no LoRA of the language model's projections")
    complain(
        file,
        "tensors do not fit a LoRA of this base",
        missing=[name for name in expected if name not in stored],
        unknown=[stored[name] for name in stored if name not in expected],
        shapes=wrong_shapes(shapes, expected, "the base"),
    )
    arrays = {
        f"{target_path(target)}/adapter/{side.lower()}": np.stack([files.read(stored[name]).T for name in names])
        for (target, side), names in lora.items()
    }
    if has_projector:
        arrays |= {path: files.read(stored[s.pattern]).transpose(s.permutation) for path, s in projector.items()}
    return AdapterFile(adapter, arrays, ("adapters", "projector") if has_projector else ("adapters",))


def _settings(config: dict[str, Any], where: Path) -> AdapterConfig:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: 'peft_type' is {config.get('peft_type')!r}, only 'LORA' is supported")
    for key, plain in _UNSUPPORTED.items():
        if key in config and config[key] not in plain:
            raise UserError(f"{where}: '{key}' is {config[key]!r}, only plain LoRA is; merge it with PEFT first")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{where}: 'r' is {rank!r}, expected a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError(f"{where}: 'lora_alpha' is {alpha!r}, expected a number over 0")
    # Rank-stabilised LoRA divides by the root of the rank: the same delta under another alpha.
    alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return AdapterConfig(kind="lora", rank=rank, alpha=float(alpha), dropout=float(config.get("lora_dropout") or 0))


def _lora_names(targets: tuple[str, ...], arch: LlavaArchitecture) -> dict[tuple[str, str], list[str]]:
    """Returns the names by layer for each target and side."""
    layers = range(arch.decoder.layers)
    return {
        (target, side): [LORA.format(layer=layer, module=MODULES[target], side=side) for layer in layers]
        for target in targets
        for side in "AB"
    }


def _projector(arch: LlavaArchitecture) -> dict[str, LeafSpec]:
    return {path: spec for path, spec in leaf_specs(arch).items() if path.startswith("projector/")}


def _canonical(name: str) -> str:
    name = name.removeprefix(PREFIX)
    # Of original LLaVA's names none is like Hugging Face's; the general "model." would be.
    original = name.startswith(("model.layers.", "model.mm_projector."))
    return renamed(name) if original else canonical(name)
