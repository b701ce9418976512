"""A MoLE as MoE-PEFT's MixLoRA directory: ``adapter_config.json`` and one file of tensors.

=================================================================================  ==========================
tensor                                                                             shape
=================================================================================  ==========================
``mixlora.layers.{layer}.self_attn.{q,k,v,o}_proj.lora_A.weight``, ``lora_B``      (R, D_in), (D_out, R)
``mixlora.layers.{layer}.mlp.{gate,up,down}_proj.experts.{e}.lora_A.weight``, ``lora_B``   (R, D_in), (D_out, R)
``mixlora.layers.{layer}.mlp.moe_gate.weight``                                     (E, D)
``multi_modal_projector.linear_{1,2}.{weight,bias}``                               as in HF: the trained projector
=================================================================================  ==========================

Its strategy ``mixlora`` takes the ``top_k`` largest softmax probabilities and divides them by their sum: with one, the
expert's delta is unscaled, as ours. It is software for language models and does not read the projector, which stands
here so that nothing trained is lost. It loads ``adapter_model.bin``: where torch is, ``torch.save(load_file(
"adapter_model.safetensors"), "adapter_model.bin")`` makes that of ours; both are read here.

Source: TUDB-Labs/MoE-PEFT, ``moe_peft/model.py`` (`init_lora_layer_weight`), ``moe_peft/adapters/mixlora/config.py``.
"""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from mole_jax import config_json
from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.files import made, read_json, write_json
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.adapter_tensors import AdapterNames, projector_specs, projector_tensors, tensors_by_layer
from mole_jax.weights.foreign import (
    HEADER,
    MODULES,
    AdapterFile,
    OwnHeader,
    check_adapter,
    own_header,
    read_table,
    spec_row,
)
from mole_jax.weights.format import Export, Format, Given, check_trained, over_base, trained_arrays
from mole_jax.weights.peft_config import CONFIG, base_of, dropout_of, refuse_settings
from mole_jax.weights.safetensors_io import open_state_dict, write_file
from mole_jax.weights.sources import LayeredSource

TENSORS, TORCH_TENSORS = "adapter_model.safetensors", "adapter_model.bin"
KIND = "MIXLORA"
_LAYER = "mixlora.layers.{layer}."
NAMES = AdapterNames(
    lora=_LAYER + "{module}.lora_{side}.weight",
    expert=_LAYER + "{module}.experts.{expert}.lora_{side}.weight",
    router={"kernel": _LAYER + "mlp.moe_gate.weight"},
)
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "num_experts"}
_READ |= {"routing_strategy", "top_k", "use_dora", "use_rslora", "expert_lora", "base_model_name_or_path", "revision"}
# Bookkeeping, and settings of the training alone.
_MOOT = {"task_type", "inference_mode", "peft_version", "lora_init", "init_lora_weights", "loraplus_lr_ratio"}
_MOOT |= {"router_aux_loss_coef", "router_init_range", "router_loss", "router_dyn_loss_coef", "jitter_noise"}
_MOOT |= {"entropy_index", "entropy_type", "entropy_eps"}
_DEFAULTS = {"bias": "none", "act_fn": "silu"}


def is_mixlora(folder: epath.Path) -> bool:
    """Tells whether `folder` is one of these."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("peft_type") == KIND


def check_mixlora(adapter: AdapterConfig, arch: LlavaArchitecture, *, where: str) -> None:
    """Raises `UserError` with the reason if MoE-PEFT would not compute a model with these adapters."""
    reason = None
    if adapter.kind != "mole":
        reason = f"has no routed experts (adapter.kind {adapter.kind})"
    elif adapter.router_bias:
        reason = "has a router with a bias (adapter.router_bias), MixLoRA's has none"
    elif adapter.router_gradient == "gate_scaled":
        reason = "scales experts by their probability (adapter.router_gradient gate_scaled), MixLoRA's top 1 does not"
    elif adapter.router_gradient == "dense":
        reason = "mixes all experts (adapter.router_gradient dense), MixLoRA adds up whole experts instead"
    elif adapter.scale != "standard":
        reason = f"has adapter.scale {adapter.scale}, MixLoRA's experts are scaled by alpha / rank"
    elif adapter.vision_targets:
        reason = "has LoRA on the vision tower (adapter.vision_targets), for which there is no place"
    elif not float(adapter.alpha).is_integer():
        reason = f"has adapter.alpha {adapter.alpha:g}, MixLoRA's lora_alpha is a whole number"
    elif arch.image_vectors:
        reason = "has learned image start and end vectors (model.image_vectors), for which there is no place"
    if reason:
        raise UserError(f"{where}: {reason}; convert it --to mole instead")


def _config(adapter: AdapterConfig, base: str | None) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base or "",
        "bias": "none",
        "lora_alpha": int(adapter.alpha),
        "lora_dropout": float(adapter.dropout),
        "num_experts": adapter.experts,
        "peft_type": KIND,
        "r": adapter.rank,
        "router_aux_loss_coef": float(adapter.balance_weight),
        "routing_strategy": "mixlora",
        "target_modules": list(adapter.targets),
        "task_type": "CAUSAL_LM",
        "top_k": 1,
    }


def read_mixlora(folder: epath.Path, arch: LlavaArchitecture) -> AdapterFile:
    """Reads a MixLoRA with one expert a token; `arch` is the base's.

    Raises:
        UserError: another strategy or another ``top_k``, an expert's settings differ from the rest's, or a tensor is
            missing, unknown or of the wrong shape.
    """
    config, where = read_json(folder / CONFIG), folder / CONFIG
    file = next((folder / name for name in (TENSORS, TORCH_TENSORS) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: holds neither {TENSORS} nor {TORCH_TENSORS}; copy the whole folder")
    tensors = open_state_dict(file)
    header = own_header(tensors.metadata, file)
    adapter = _settings(config, header, where)
    table, projector = NAMES.table(adapter, arch), projector_specs(arch)
    has_projector = any(spec.pattern in tensors.shapes for spec in projector.values())
    if has_projector:
        table |= {path: spec_row(spec) for path, spec in projector.items()}
    what = f"tensors do not fit {CONFIG} and this base"
    arrays = read_table(tensors, table, where=file, what=what, asks=f"{CONFIG} on this base")
    return AdapterFile(
        adapter=adapter,
        arrays=arrays,
        trained=("adapters", "router", "projector") if has_projector else ("adapters", "router"),
        changes=header.changes,
        prompt=header.prompt,
        image_aspect=header.image_aspect,
    )


def _settings(config: dict[str, Any], header: OwnHeader, where: epath.Path) -> AdapterConfig:
    remedy = "only plain LoRA experts, one a token, are"
    refuse_settings(config, _READ | _MOOT, _DEFAULTS, where, remedy)
    for key, supported in {
        "routing_strategy": ("mixlora", "mixtral"),  # its name in MoE-PEFT and in the older MixLoRA package
        "top_k": (1,),
        "use_dora": (None, False),
        "use_rslora": (None, False),
        "expert_lora": (None,),
    }.items():
        if config.get(key) not in supported:
            words = " or ".join(repr(one) for one in supported if one is not None) or "none"
            raise UserError(f"{where}: '{key}' is {config.get(key)!r}, only {words} is supported")
    found, dropout = {}, dropout_of(config, where)
    for key in ("r", "lora_alpha", "num_experts"):
        found[key] = config.get(key)
        if isinstance(found[key], bool) or not isinstance(found[key], int) or found[key] < 1:
            raise UserError(f"{where}: '{key}' is {found[key]!r}, expected a whole number of at least 1")
    modules = config.get("target_modules")
    # A list of names, or a dict that says of each whether it is one.
    chosen = [name for name in modules if not isinstance(modules, dict) or modules[name]] if modules else []
    if not chosen or set(chosen) - set(MODULES):
        raise UserError(f"{where}: 'target_modules' is {modules!r}, expected some of {', '.join(MODULES)}")
    own = {
        "kind": "mole",
        "rank": found["r"],
        "alpha": float(found["lora_alpha"]),
        "experts": found["num_experts"],
        "targets": tuple(name for name in MODULES if name in chosen),
    }
    if header.adapter is not None:
        adapter = header.adapter
        if {name: getattr(adapter, name) for name in own} | {"targets": set(adapter.targets)} != own | {
            "targets": set(own["targets"])
        }:
            raise UserError(f"{where}: says other settings than the tensors' own header; copy the whole folder")
        return adapter
    return check_adapter(AdapterConfig(**own, dropout=dropout), where=where)


def _read(given: Given) -> LayeredSource:
    where = given.path / CONFIG
    return over_base(given, base_of(read_json(where), where, named=given.base is not None), read_mixlora)


def _check(export: Export) -> None:
    check_mixlora(export.adapter, export.architecture, where=export.where)
    check_trained(export)


def _write(export: Export, folder: str) -> None:
    """Writes adapters and router, and the projector where it was trained; one tensor is held at a time."""
    adapter, arch, leaves = export.adapter, export.architecture, export.leaves
    tensors = tensors_by_layer(NAMES, adapter, arch, leaves) | projector_tensors(arch, leaves)
    output = made(epath.Path(folder))
    header = {"adapter": config_json.to_json(adapter), **export.settings}
    write_file(output / TENSORS, tensors, {"format": "pt", HEADER: json.dumps(header)})
    write_json(output / CONFIG, _config(adapter, export.base_name), indent=2)
    export.save_tokenizer(folder)


FORMAT = Format(
    name="mixlora",
    reads="MoE-PEFT's MixLoRA directory",
    recognise=lambda given: is_mixlora(given.path),
    options=("base",),
    read=_read,
    writes="MoE-PEFT's MixLoRA directory",
    kinds=("mole",),
    wants=trained_arrays,
    check=_check,
    write=_write,
)
