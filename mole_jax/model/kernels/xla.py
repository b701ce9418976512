"""Attention from its definition: all scores at once, as XLA makes of it what it can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mole_jax.model.kernels.saved import ATTENTION


def attend(
    q: Float[Array, "B S H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    segment_ids: Int[Array, "B S"] | None,
    causal: bool,
) -> Float[Array, "B S H C"]:
    """See `mole_jax.model.attention.attention`; every row and head takes S x S numbers."""
    visible = None
    if causal:
        visible = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))[None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        visible = same if visible is None else visible & same
    mask = None if visible is None else visible[:, None]
    return checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla"), ATTENTION)
