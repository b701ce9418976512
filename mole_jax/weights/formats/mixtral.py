"""A trained MoLE as a stock Hugging Face model: LLaVA over a Mixtral of merged experts.

A MoLE layer sends each token to the expert of the largest router logit and adds that expert's unscaled delta. Mixtral
(transformers 5, `MixtralTopKRouter`) takes a softmax over all experts, keeps the `num_experts_per_tok` largest and
divides them by their sum: with one expert kept, its weight is exactly 1. So a Mixtral block whose expert e holds
``W + (alpha / rank) A_e B_e`` for all three projections is the same function, and any software that serves Mixtral
serves it. A router bias (Mixtral has none) or a delta scaled by its probability breaks the identity.

Frozen attention takes its plain LoRA merged. Layouts: `mole_jax.weights.names`, and beside it, per layer,
``language_model.model.layers.{layer}.block_sparse_moe.`` + ``gate.weight`` (E, D), ``experts.{e}.w1.weight`` (F, D),
``experts.{e}.w3.weight`` (F, D), ``experts.{e}.w2.weight`` (D, F), which transformers 4 and 5 both read.

In bfloat16 transformers also computes the router in bfloat16, where tokens near a tie may choose the other expert.
"""

from __future__ import annotations

import numpy as np

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.families import write_architecture
from mole_jax.model.architecture import DecoderArchitecture, LlavaArchitecture
from mole_jax.weights.format import Export, Format, not_a_llama
from mole_jax.weights.hf_checkpoint import foreign_tensors
from mole_jax.weights.hf_folder import write_folder
from mole_jax.weights.leaf import Leaf, Leaves, as_leaf, main_type, tensor
from mole_jax.weights.merge import merged_layer, merged_leaf
from mole_jax.weights.names import leaf_specs

_BLOCK = "language_model.model.layers.{layer}.block_sparse_moe."
ROUTER = _BLOCK + "gate.weight"
EXPERT = _BLOCK + "experts.{expert}.{matrix}.weight"
FAMILIES = ("llava", "llava_next")
"""Whose class takes any decoder, named as `ROUTER` and `EXPERT` are."""
MATRICES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Mixtral's name of each projection."""

_MLP = "decoder/layers/mlp/"
_ROUTER = _MLP + "router/kernel"


def check_mixtral(adapter: AdapterConfig, arch: LlavaArchitecture, *, where: str) -> None:
    """Raises `UserError` with the reason if a model with these adapters is no Mixtral of merged experts."""
    if adapter.kind != "mole":
        raise UserError(f"{where}: has no routed experts (adapter.kind {adapter.kind}); convert it --to hf instead")
    if (reason := not_a_llama(arch, *FAMILIES)) is not None:
        reason = f"it {reason}"
    elif adapter.router_bias:
        reason = "its router has a bias (adapter.router_bias), for which Mixtral has no place"
    elif adapter.router_gradient == "gate_scaled":
        reason = "its experts are scaled by their probability (adapter.router_gradient gate_scaled), Mixtral's are not"
    elif adapter.router_gradient == "dense":
        reason = "it mixes all experts (adapter.router_gradient dense), Mixtral adds up whole experts instead"
    if reason:
        raise UserError(
            f"{where}: is no Mixtral, so stock software cannot compute it: {reason}; "
            "keep it as a run, or fold one expert with --expert"
        )


def architecture_to_mixtral(arch: LlavaArchitecture, experts: int, dtype: str = "bfloat16") -> dict:
    """Returns the config.json of `arch` with a Mixtral of so many experts as its decoder, top-1.

    Raises:
        UserError: `arch` has image vectors.
    """
    config = write_architecture(arch, dtype)
    text = {key: value for key, value in config["text_config"].items() if key not in ("attention_bias", "mlp_bias")}
    config["text_config"] = text | {
        "model_type": "mixtral",
        "num_experts_per_tok": 1,
        "num_local_experts": experts,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }
    return config


def _blocks(arch: DecoderArchitecture, adapter: AdapterConfig, leaves: Leaves) -> dict[str, Leaf]:
    """Returns routers and merged experts by name, unmade; an expert is in the type of the kernel that it comes from."""
    tensors: dict[str, Leaf] = {}
    for layer in range(arch.layers):
        router = as_leaf(_ROUTER, leaves[_ROUTER])
        tensors[ROUTER.format(layer=layer)] = tensor(
            (adapter.experts, arch.width), router.dtype_of(layer), lambda layer=layer, router=router: router[layer].T
        )
        for expert in range(adapter.experts):
            for target, matrix in MATRICES.items():
                path = f"{_MLP}{target}/kernel"
                kernel = as_leaf(path, leaves[path])

                def merged(path: str = path, layer: int = layer, expert: int = expert) -> np.ndarray:
                    return merged_layer(leaves, path, adapter, layer, expert).T

                name = EXPERT.format(layer=layer, expert=expert, matrix=matrix)
                tensors[name] = tensor(kernel.shape[:0:-1], kernel.dtype_of(layer), merged)
    return tensors


def _check(export: Export) -> None:
    write_architecture(export.architecture)  # refuses learned image vectors
    check_mixtral(export.adapter, export.architecture, where=export.where)


def _write(export: Export, folder: str) -> None:
    """Writes a folder that transformers 5 loads as LlavaForConditionalGeneration.

    One matrix of one layer is merged and held at a time; sums are in float32, and rounded once.
    """
    adapter, beside = export.adapter, export.beside()
    arch, leaves = beside.architecture, beside.leaves(export.leaves)
    specs = {path: spec for path, spec in leaf_specs(arch).items() if not path.startswith(_MLP)}
    whole = {path: merged_leaf(leaves, path, adapter) for path in specs}
    tensors = foreign_tensors(specs, whole) | _blocks(arch.decoder, adapter, leaves)
    config = architecture_to_mixtral(arch, adapter.experts, main_type(tensors.values()).name)
    write_folder(folder, config, beside, tensors)


FORMAT = Format(
    name="mixtral",
    writes="a MoLE as a stock Mixtral of merged experts",
    to="hf",
    kinds=("mole",),
    whole=True,
    check=_check,
    write=_write,
)
