"""A trained MoLE as a stock Hugging Face model: its family over a mixture of merged experts.

A MoLE layer sends each token to the expert of the largest router logit and adds that expert's unscaled delta. The
mixtures of transformers 5 (`MixtralTopKRouter`, `Qwen2MoeTopKRouter`, `Qwen3MoeTopKRouter`) take a softmax over all
experts, keep the `num_experts_per_tok` largest and divide them by their sum: with one expert kept, its weight is
exactly 1. So a block whose expert e holds ``W + (alpha / rank) A_e B_e`` for all three projections is the same
function, and any software that serves the mixture serves it. A router bias (they have none) or a delta scaled by its
probability breaks the identity.

A Llama becomes a Mixtral, a Qwen2 a Qwen2-MoE, a Qwen3 a Qwen3-MoE. Qwen2-MoE always has an expert that all tokens
share; its output matrix is zero here.

Frozen attention takes its plain LoRA merged. In bfloat16 transformers also computes the router in bfloat16, where
tokens near a tie may choose the other expert.

It is not read back: a merged expert does not say which part of it was the base, so neither adapters nor a base to train
could be made of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.families import write_architecture
from mole_jax.families.shared.decoders import kind_of
from mole_jax.files import PathLike
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.format import Export, Format
from mole_jax.weights.hf_checkpoint import foreign_tensors
from mole_jax.weights.hf_folder import write_folder
from mole_jax.weights.leaf import Leaf, Leaves, as_leaf, main_type, tensor
from mole_jax.weights.merge import merged_layer, merged_leaf
from mole_jax.weights.names import leaf_specs

_MLP = "decoder/layers/mlp/"
_ROUTER = _MLP + "router/kernel"
_SAME = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
SHARED_WIDTH = 64
"""Of the shared expert that adds nothing: small, and what every matrix kernel takes."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """One of transformers' mixtures: names of a layer's tensors, and what ``text_config`` says of it."""

    kind: str
    """Its ``model_type``."""
    block: str
    matrices: Mapping[str, str]
    """Its name of each projection of an expert."""
    experts: str
    """Field that has their number."""
    width: str
    """Field that has their width."""
    says: Mapping[str, Any]
    """Further fields."""
    omits: tuple[str, ...]
    """Fields of the dense decoder that it does not have."""
    shared: bool = False
    """It has an expert for all tokens, whose output is scaled by a gate."""


_QWEN = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
MIXTURES: Mapping[str, Mixture] = {
    "llama": Mixture(
        "mixtral",
        "block_sparse_moe.",
        {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        experts="num_local_experts",
        width="intermediate_size",
        says={"router_jitter_noise": 0.0, "sliding_window": None},
        omits=("attention_bias", "mlp_bias"),
    ),
    "qwen2": Mixture(
        "qwen2_moe",
        "mlp.",
        _SAME,
        experts="num_experts",
        width="moe_intermediate_size",
        says=_QWEN | {"qkv_bias": True, "shared_expert_intermediate_size": SHARED_WIDTH},
        omits=(),
        shared=True,
    ),
    "qwen3": Mixture(
        "qwen3_moe", "mlp.", _SAME, experts="num_experts", width="moe_intermediate_size", says=_QWEN, omits=()
    ),
}
"""By the kind of the dense decoder."""


def check_no_mixture(config: Mapping[str, Any], *, where: PathLike) -> None:
    """Raises `UserError` if the content of a config.json is of such a mixture."""
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    if any(one.kind == kind for one in MIXTURES.values()):
        raise UserError(
            f"{where}: is a mixture of merged experts ({kind}), which is for transformers and is not read here; use "
            "the run that it was made of, or that run's --to mole folder"
        )


def check(adapter: AdapterConfig, *, where: str) -> None:
    """Raises `UserError` with the reason if a model with these adapters is no mixture of merged experts."""
    if adapter.kind != "mole":
        raise UserError(f"{where}: has no routed experts (adapter.kind {adapter.kind}); convert it --to hf instead")
    if adapter.router_bias:
        reason = "its router has a bias (adapter.router_bias), for which they have no place"
    elif adapter.router_gradient == "gate_scaled":
        reason = "its experts are scaled by their probability (adapter.router_gradient gate_scaled), theirs are not"
    elif adapter.router_gradient == "dense":
        reason = "it mixes all experts (adapter.router_gradient dense), they add up whole experts instead"
    else:
        return
    raise UserError(
        f"{where}: is no Mixtral or mixture of Qwen's, so stock software cannot compute it: {reason}; "
        "keep it as a run or --to mole, or fold one expert with --expert"
    )


def config_of(arch: LlavaArchitecture, mixture: Mixture, experts: int, dtype: str) -> dict[str, Any]:
    """Returns the config.json of `arch` with a mixture of so many experts as its decoder, top-1.

    Raises:
        UserError: `arch` has image vectors.
    """
    config = write_architecture(arch, dtype)
    text = {key: value for key, value in config["text_config"].items() if key not in mixture.omits}
    config["text_config"] = {
        **text,
        "model_type": mixture.kind,
        "num_experts_per_tok": 1,
        "output_router_logits": False,
        mixture.experts: experts,
        mixture.width: arch.decoder.mlp_width,
        **mixture.says,
    }
    return config


def _blocks(arch: LlavaArchitecture, mixture: Mixture, adapter: AdapterConfig, leaves: Leaves) -> dict[str, Leaf]:
    """Returns routers and merged experts by name, unmade; an expert is in the type of the kernel that it comes from."""
    dense = leaf_specs(arch)[_MLP + "gate_proj/kernel"].pattern
    block = dense.removesuffix("mlp.gate_proj.weight") + mixture.block
    tensors: dict[str, Leaf] = {}
    for layer in range(arch.decoder.layers):
        prefix, router = block.format(layer=layer), as_leaf(_ROUTER, leaves[_ROUTER])
        tensors[prefix + "gate.weight"] = tensor(
            (adapter.experts, arch.decoder.width),
            router.dtype_of(layer),
            lambda layer=layer, router=router: router[layer].T,
        )
        for target, matrix in mixture.matrices.items():
            path = f"{_MLP}{target}/kernel"
            kernel = as_leaf(path, leaves[path])
            for expert in range(adapter.experts):

                def merged(path: str = path, layer: int = layer, expert: int = expert) -> np.ndarray:
                    return merged_layer(leaves, path, adapter, layer, expert).T

                name = f"{prefix}experts.{expert}.{matrix}.weight"
                tensors[name] = tensor(kernel.shape[:0:-1], kernel.dtype_of(layer), merged)
        if mixture.shared:
            tensors |= _nothing(prefix, arch.decoder.width, kernel.dtype_of(layer))
    return tensors


def _nothing(prefix: str, width: int, dtype: np.dtype) -> dict[str, Leaf]:
    """Returns a shared expert that adds zero."""
    shapes = {
        "shared_expert.gate_proj.weight": (SHARED_WIDTH, width),
        "shared_expert.up_proj.weight": (SHARED_WIDTH, width),
        "shared_expert.down_proj.weight": (width, SHARED_WIDTH),
        "shared_expert_gate.weight": (1, width),
    }
    return {
        prefix + name: tensor(shape, dtype, lambda shape=shape: np.zeros(shape, dtype))
        for name, shape in shapes.items()
    }


def _check(export: Export) -> None:
    write_architecture(export.architecture)  # refuses learned image vectors
    check(export.adapter, where=export.where)


def _write(export: Export, folder: str) -> None:
    """Writes a folder that transformers 5 loads as the family's class.

    One matrix of one layer is merged and held at a time; sums are in float32, and rounded once.
    """
    adapter, beside = export.adapter, export.beside()
    arch, leaves = beside.architecture, beside.leaves(export.leaves)
    mixture = MIXTURES[kind_of(arch.decoder)]
    specs = {path: spec for path, spec in leaf_specs(arch).items() if not path.startswith(_MLP)}
    whole = {path: merged_leaf(leaves, path, adapter) for path in specs}
    tensors = foreign_tensors(specs, whole) | _blocks(arch, mixture, adapter, leaves)
    config = config_of(arch, mixture, adapter.experts, main_type(tensors.values()).name)
    write_folder(folder, config, beside, tensors)


FORMAT = Format(
    name="merged_experts",
    writes="a MoLE as a stock mixture of merged experts: Mixtral, Qwen2-MoE or Qwen3-MoE",
    to="hf",
    kinds=("mole",),
    library="transformers",
    whole=True,
    check=_check,
    write=_write,
)
