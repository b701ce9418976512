"""Attention from its definition: all scores at once, as XLA makes of it what it can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mole_jax.model.kernels.saved import ATTENTION


def attend(
    q: Float[Array, "B H S C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    segment_ids: Int[Array, "B S"] | None,
    causal: bool,
) -> Float[Array, "B H S C"]:
    """See `mole_jax.model.attention.attention`; every row and head takes S x S numbers."""
    visible = None
    if causal:
        visible = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))[None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        visible = same if visible is None else visible & same
    mask = None if visible is None else visible[:, None]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
    return checkpoint_name(y.swapaxes(1, 2), ATTENTION)
