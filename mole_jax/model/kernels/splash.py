"""Attention on TPUs: tokamax's splash kernel, which skips blocks that the causal mask or other segments rule out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mole_jax import compat
from mole_jax.model.kernels.saved import ATTENTION

LANES = 128
"""Lengths are padded to a multiple of this."""

BLOCKS = (512, 384, 256, 128)
"""Sizes of a block, best first (compiled for v5e at length 2,048: 128 takes 3 times the cycles of 512)."""


def attend(
    q: Float[Array, "B H S C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    segment_ids: Int[Array, "B S"] | None,
    causal: bool,
    *,
    interpret: bool = False,
) -> Float[Array, "B H S C"]:
    """See `mole_jax.model.attention.attention`; `interpret` runs the kernel's program step by step on any device."""
    rows, _, length, _ = q.shape
    padded = -(-length // LANES) * LANES
    block = padded if padded <= BLOCKS[0] else next(size for size in BLOCKS if padded % size == 0)
    if segment_ids is None:
        segment_ids = jnp.zeros((rows, length), jnp.int32)
    # What is padded here is a segment of its own, which sees itself: a softmax over nothing would be no number.
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - length)), constant_values=-1)
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padded - length), (0, 0))) for x in (q, k, v))
    kernel = compat.splash_attention(padded, q.shape[1], q.shape[3], block, causal, ATTENTION, interpret)
    return jax.vmap(kernel)(q, k, v, segment_ids)[:, :, :length]
