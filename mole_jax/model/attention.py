"""Attention: the one place that decides which keys a query sees, and computes the result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    q: Float[Array, "B S H C"], k: Float[Array, "B T K C"], v: Float[Array, "B T K C"]
) -> Float[Array, "B S H*C"]:
    """Returns attention in which every query sees every key. For the computation see `causal_attention`."""
    return _attend(q, k, v, None)


def causal_attention(
    q: Float[Array, "B S H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    *,
    segment_ids: Int[Array, "B S"] | None = None,
    start: Int[Array, " B"] | None = None,
) -> Float[Array, "B S H*C"]:
    """Returns attention in which a query sees no key after its own place.

    Scaled dot product with grouped heads (H is a multiple of K) and a float32 softmax; the heads come back joined.

    Args:
        q, k, v: queries, keys and values.
        segment_ids: a query sees only the keys of its own segment. Queries and keys are then the same tokens (S = T).
        start: place of each row's first query among the T slots of a cache. None: 0, as queries and keys are the same
            tokens.
    """
    places = jnp.arange(q.shape[1]) + (jnp.zeros((1, 1), jnp.int32) if start is None else start[:, None])
    visible = jnp.arange(k.shape[1]) <= places[:, :, None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return _attend(q, k, v, visible[:, None])


def _attend(q: Array, k: Array, v: Array, mask: Bool[Array, "B 1 S T"] | None) -> Array:
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
    return y.reshape(*y.shape[:2], -1)
