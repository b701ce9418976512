"""PEFT's ``adapter_config.json`` of a LoRA, to and from `AdapterConfig`: a closed list of settings.

A setting that is not understood could make the delta another one than ``(alpha / r) B A x`` on the base as it is, so it
must be at PEFT's default. Defaults and meanings are those of PEFT 0.21 (`LoraConfig`, `LoraLayer.update_layer`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

from etils import epath

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.weights.foreign import MODULES, check_adapter

CONFIG = "adapter_config.json"

_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"}
_READ |= {"base_model_name_or_path", "revision"}
# The tensors themselves tell what these say.
_TOLD_BY_TENSORS = {"target_modules", "exclude_modules", "modules_to_save"}
# No part of the function that the adapters compute: bookkeeping, and settings of a first value (which one:
# `init_lora_weights`) or of a switch that is itself refused when it is on.
_MOOT = {"task_type", "inference_mode", "auto_mapping", "peft_version", "runtime_config"}
_MOOT |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
_MOOT |= {"qalora_group_size", "megatron_core", "layers_pattern"}
_UNDERSTOOD = _READ | _TOLD_BY_TENSORS | _MOOT
_DEFAULTS = {"bias": "none"}
"""PEFT's defaults of other settings, where they are not nothing (`says_nothing`)."""

# First values after which the base is what it was; under the others, B A was taken off the base.
_BASE_KEPT = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGED = re.compile(r"pissa(_niter_\d+)?|corda|olora|lora_ga", re.IGNORECASE)


def says_nothing(value: Any) -> bool:
    """Tells whether a setting is off: null, false, an empty list, object or text."""
    return value is None or value is False or value in ([], {}, "")


def refuse_settings(
    config: Mapping[str, Any], understood: Collection[str], defaults: Mapping[str, Any], where: epath.Path, remedy: str
) -> None:
    """Raises `UserError` that names the first setting which is neither understood nor at its default.

    Args:
        config: the parsed file.
        understood: settings that may say anything.
        defaults: the value that another setting may have, besides none at all.
        where: the file.
        remedy: what the user can do.
    """
    for key, value in config.items():
        if key not in understood and not says_nothing(value) and value != defaults.get(key):
            raise UserError(f"{where}: '{key}' is {value!r}, which is not read here; {remedy}")


def adapter_from_peft(config: Mapping[str, Any], where: epath.Path) -> AdapterConfig:
    """Reads a LoRA's settings; its targets are told by the tensors.

    Raises:
        UserError: another method, a malformed value, or a setting under which the delta is another one than
            ``(alpha / r) B A x`` on the base as it is.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: 'peft_type' is {config.get('peft_type')!r}, only 'LORA' is supported")
    remedy = "only plain LoRA is: merge the adapter with PEFT (merge_and_unload) and convert the whole model"
    refuse_settings(config, _UNDERSTOOD, _DEFAULTS, where, remedy)
    _check_first_values(config.get("init_lora_weights"), where)
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), dropout_of(config, where)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{where}: 'r' is {rank!r}, expected a whole number of at least 1")
    if not _is_number(alpha) or not alpha > 0:
        raise UserError(f"{where}: 'lora_alpha' is {alpha!r}, expected a number over 0")
    if not isinstance(config.get("use_rslora") or False, bool):
        raise UserError(f"{where}: 'use_rslora' is {config['use_rslora']!r}, expected true or false")
    adapter = AdapterConfig(
        kind="lora",
        rank=rank,
        alpha=float(alpha),
        scale="rslora" if config.get("use_rslora") else "standard",
        dropout=dropout,
    )
    return check_adapter(adapter, where=where)


def dropout_of(config: Mapping[str, Any], where: epath.Path) -> float:
    """Returns ``lora_dropout``; raises `UserError` if it is no share."""
    dropout = 0 if config.get("lora_dropout") is None else config["lora_dropout"]
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"{where}: 'lora_dropout' is {dropout!r}, expected a number from 0 to below 1")
    return float(dropout)


def _check_first_values(init: Any, where: epath.Path) -> None:
    """Raises `UserError` if the adapters began as a part of the base, which the base they stand on then lacks."""
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _BASE_KEPT):
        return
    if isinstance(init, str) and _BASE_CHANGED.fullmatch(init):
        remedy = (
            "make a plain LoRA of it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "or merge it there onto the changed base"
        )
    elif init == "loftq":
        remedy = "merge it with PEFT onto the quantised base that it was trained on and convert the whole model"
    else:
        raise UserError(f"{where}: 'init_lora_weights' is {init!r}, which is not known here")
    raise UserError(
        f"{where}: 'init_lora_weights' is {init!r}, which took the adapters' first values off the base, so they do not "
        f"belong on the base as it is; {remedy}"
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def peft_config(
    adapter: AdapterConfig,
    base: str | None,
    with_projector: bool,
    *,
    decoder: str = "language_model",
    connector: str = "multi_modal_projector",
    tower: str = "vision_tower",
    tower_modules: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the config with which PEFT loads a LoRA of the language model.

    Args:
        adapter: the LoRA.
        base: folder or hub name of what it stands on, if that has a name.
        with_projector: the trained projector is beside it.
        decoder: transformers' name of the decoder's module.
        connector: that of the projector's.
        tower: that of the vision tower's.
        tower_modules: names of its LoRA's tensors, each with a ``{layer}.`` before its module's.
    """
    modules = "|".join(re.escape(MODULES[target]) for target in adapter.targets)
    pattern = rf"(.*\.)?{decoder}\.(.*\.)?layers\.\d+\.({modules})"
    if tower_modules:
        own = (name.partition("{layer}.")[2].partition(".lora_")[0] for name in tower_modules)
        pattern += rf"|(.*\.)?{tower}\.(.*\.)?layers?\.\d+\.({'|'.join(map(re.escape, own))})"
    return {
        "base_model_name_or_path": base or "",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": [connector] if with_projector else None,
        "peft_type": "LORA",
        "r": adapter.rank,
        # A pattern, because a list of bare names would also hit the vision tower's projections.
        "target_modules": pattern,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.scale == "rslora",
    }


def base_of(config: Mapping[str, Any], where: epath.Path, *, named: bool) -> str | None:
    """Returns the base that adapters name; `named`: the user names another, so that theirs does not matter.

    Raises:
        UserError: it is a certain revision of a hub repository, which a name alone does not find.
    """
    base, revision = config.get("base_model_name_or_path") or None, config.get("revision")
    if not isinstance(base, str | None):
        raise UserError(f"{where}: 'base_model_name_or_path' is {base!r}, expected a name; name the base with --base")
    if not named and revision not in (None, "", "main"):
        raise UserError(
            f"{where}: 'revision' of its base is {revision!r}; download that revision and name its folder with --base"
        )
    return base
