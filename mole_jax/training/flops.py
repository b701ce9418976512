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
    and a frozen vision tower 2N. Attention counts half of S x S, being causal.
    """
    rows, length = config.train.batch_rows, config.data.sequence_length
    tokens = rows * length
    image_tokens = rows * config.data.images_per_row * (arch.vision.patches + 1)
    total = 0.0
    for path, parameter in declarations.items():
        # Embeddings are looked up, not multiplied; the head counts like any matrix.
        if not path.endswith(("kernel", "/a", "/b", "patch_embedding")):
            continue
        group = group_of(parameter)
        seen = image_tokens if group in ("vision", "projector") else tokens
        through = group != "vision" or "vision" in trainable
        total += 2.0 * math.prod(parameter.shape) * seen * (1 + through + (group in trainable))
    if arch.decoder.tied_head:
        total += 4.0 * arch.decoder.vocab * arch.decoder.width * tokens
    attention = 4 * arch.decoder.layers * arch.decoder.heads * arch.decoder.head_dim * length / 2
    return total + 3 * attention * tokens
