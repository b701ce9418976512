"""Attention over the keys and values of earlier tokens: what decoding computes instead of `attention.py`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mole_jax.parallel.devices import kind_in_force


class LayerCache(NamedTuple):
    """The cache of all layers, and the number of the one in hand.

    Layers are written where they lie, so a scan that carries the cache holds it once. The heads of a place are one
    axis: a TPU pads the last two axes to its tiles, and (T, K*C) fills them whatever C is.
    """

    k: Float[Array, "L B T K*C"]
    v: Float[Array, "L B T K*C"]
    layer: Int[Array, ""]

    def write(self, k: Float[Array, "B S K C"], v: Float[Array, "B S K C"], slots: Int[Array, " B"]) -> LayerCache:
        """Writes each row from its slot on; what would lie past the last slot is dropped."""
        rows, places = jnp.arange(len(slots))[:, None], slots[:, None] + jnp.arange(k.shape[1])

        def put(old: Array, new: Array) -> Array:
            new = new.reshape(*new.shape[:2], -1).astype(old.dtype)
            return old.at[self.layer, rows, places].set(new, mode="drop", unique_indices=True)

        return LayerCache(put(self.k, k), put(self.v, v), self.layer)


def cached_attention(q: Float[Array, "B S H C"], cache: LayerCache, slots: Int[Array, " B"]) -> Float[Array, "B S H*C"]:
    """Returns attention of the queries at places ``slots + [0..S)`` of each row over all places up to their own.

    Scaled dot product with grouped heads (H is a multiple of K) and a float32 softmax; the heads come back joined.
    """
    k, v = (jax.lax.dynamic_index_in_dim(one, cache.layer, keepdims=False) for one in (cache.k, cache.v))
    places = slots[:, None] + jnp.arange(q.shape[1])
    visible = jnp.arange(k.shape[1]) <= places[:, :, None]
    attend = _one_query if q.shape[1] == 1 and one_product_pays() else _by_head
    return attend(q, k, v, visible)


def one_product_pays() -> bool:
    """Returns whether one token's heads are faster as one product with K times the work than as K products.

    A TPU and a CPU read the cache as it lies then; a product for each head moves it to another layout first. A GPU
    reads any layout, and has no work to spare.
    """
    return kind_in_force() in ("TPU", "cpu")


def _by_head(
    q: Float[Array, "B S H C"],
    k: Float[Array, "B T K*C"],
    v: Float[Array, "B T K*C"],
    visible: Bool[Array, "B S T"],
) -> Float[Array, "B S H*C"]:
    rows, length, _, size = q.shape
    k, v = (one.reshape(*one.shape[:2], -1, size) for one in (k, v))
    q = q.reshape(rows, length, k.shape[2], -1, size)
    scores = jnp.einsum("bskgc,btkc->bkgst", q, k, preferred_element_type=_wide(q))
    weights = _softmax(scores, visible[:, None, None], size).astype(v.dtype)
    return jnp.einsum("bkgst,btkc->bskgc", weights, v).reshape(rows, length, -1)


def _one_query(
    q: Float[Array, "B 1 H C"],
    k: Float[Array, "B T K*C"],
    v: Float[Array, "B T K*C"],
    visible: Bool[Array, "B 1 T"],
) -> Float[Array, "B 1 H*C"]:
    """As `_by_head`: the queries are padded with zeros to all heads' channels, and of the results the own are kept."""
    rows, _, heads, size = q.shape
    groups = k.shape[-1] // size
    own = jnp.arange(heads)[:, None] // (heads // groups) == jnp.arange(groups)  # (H, K)
    # Channels last, as the cache has them: a CPU would turn (K*C, H) round, which takes longer than the products.
    wide = jnp.where(own[:, :, None], q[:, 0, :, None], 0).reshape(rows, heads, -1)  # (B, H, K*C)
    scores = jnp.einsum("bhd,btd->bht", wide, k, preferred_element_type=_wide(q))
    weights = _softmax(scores, visible, size).astype(v.dtype)
    y = jnp.einsum("bht,btd->bhd", weights, v).reshape(rows, heads, groups, size)
    return jnp.where(own[:, :, None], y, 0).sum(axis=2).reshape(rows, 1, -1)


def _softmax(scores: Array, visible: Bool[Array, ...], size: int) -> Array:
    return jax.nn.softmax(jnp.where(visible, scores * size**-0.5, jnp.finfo(scores.dtype).min), axis=-1)


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
