"""Floating-point operations of a training step, counted from shapes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from mole_jax.config import Config
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parameters import Parameter, group_of


def step_flops(
    config: Config, arch: LlavaArchitecture, declarations: Mapping[str, Parameter], trainable: Collection[str]
) -> float:
    """Returns the FLOPs one optimizer step needs over all devices, recomputation not counted.

    Each matrix costs two FLOPs per number and token in the forward pass, two more where an activation
    gradient flows through it and two more where it is trained. A frozen decoder thus costs 4N a token
    and a frozen vision tower 2N. The decoder's attention counts half of S x S, being causal, the tower's all of it. All
    tile slots of a row count, also those that a batch leaves empty.
    """
    rows, length = config.train.batch_rows, config.data.sequence_length
    tokens = rows * length
    tiles = rows * config.data.tiles_per_row
    positions = {"vision": tiles * arch.vision.tokens, "projector": tiles * arch.features_per_image}
    total = 0.0
    adapted = bool(config.adapter.vision_targets) and "adapters" in trainable
    tower = "vision" in trainable or adapted
    for path, parameter in declarations.items():
        if not is_matrix(path):
            continue
        group = group_of(parameter)
        seen = positions.get("vision" if path.startswith("vision/") else group, tokens)
        through = not path.startswith("vision/") or tower
        total += 2.0 * math.prod(parameter.shape) * seen * (1 + through + (group in trainable))
    if arch.decoder.tied_head:
        total += 4.0 * arch.decoder.vocab * arch.decoder.width * tokens
    vision = arch.vision
    attention = 4.0 * vision.layers * vision.width * vision.tokens**2 * tiles
    return total + 3 * _attention(config, arch) + (3 if tower else 1) * attention


def recomputed_flops(config: Config, arch: LlavaArchitecture, declarations: Mapping[str, Parameter]) -> float:
    """Returns the FLOPs of a step's forward pass that `model.remat` makes the backward pass do again.

    With these `step_flops` is what the hardware does: HFU where `step_flops` alone gives MFU. The logits are always
    computed again, and of the decoder's layers what `model.layers.KEPT` does not name; low-rank products under "most"
    are left out, and a vision tower without LoRA has no backward pass.
    """
    tokens = config.train.batch_rows * config.data.sequence_length
    total = 2.0 * arch.decoder.vocab * arch.decoder.width * tokens
    remat = config.model.remat
    if remat in ("full", "attention"):
        kept = ("/q_proj/", "/k_proj/", "/v_proj/") if remat == "attention" else ()
        layers = [
            parameter
            for path, parameter in declarations.items()
            if path.startswith("decoder/layers/") and is_matrix(path) and not any(name in path for name in kept)
        ]
        total += sum(2.0 * math.prod(parameter.shape) * tokens for parameter in layers)
    if remat != "none" and config.adapter.vision_targets:
        seen = config.train.batch_rows * config.data.tiles_per_row * arch.vision.tokens
        tower = [
            parameter for path, parameter in declarations.items() if path.startswith("vision/") and is_matrix(path)
        ]
        total += sum(2.0 * math.prod(parameter.shape) * seen for parameter in tower)
    if remat == "full":
        total += _attention(config, arch)
    return total


def is_matrix(path: str) -> bool:
    """Tells whether a parameter multiplies activations. Embeddings are looked up; the head counts like any matrix."""
    return path.endswith(("kernel", "/a", "/b", "patch_embedding"))


def _attention(config: Config, arch: LlavaArchitecture) -> float:
    """FLOPs of the decoder's scores and their products with the values, forward."""
    tokens = config.train.batch_rows * config.data.sequence_length
    decoder = arch.decoder
    return 4 * decoder.layers * decoder.heads * decoder.head_dim * config.data.sequence_length / 2 * tokens
