"""Attention by blocks of queries in plain JAX: scores stay in a processor's cache, and no S x S array is kept.

The backward pass computes the scores again from the softmax's logarithm, as FlashAttention does (Dao et al. 2022,
algorithm 4). A block of queries meets only keys up to its own end, which halves causal attention's work.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mole_jax.model.kernels.saved import ATTENTION

BLOCK, MOST = 128, 16
"""Queries in a block, and the number of blocks from which on they grow instead: each is compiled by itself."""


def attend(
    q: Float[Array, "B H S C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    segment_ids: Int[Array, "B S"] | None,
    causal: bool,
) -> Float[Array, "B H S C"]:
    """See `mole_jax.model.attention.attention`."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    return _blocks(causal, grouped, k, v, segment_ids).reshape(q.shape)


def _parts(length: int) -> Iterator[slice]:
    block = max(BLOCK, BLOCK * -(-length // (BLOCK * MOST)))
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def _visible(causal: bool, segment_ids: Array | None, part: slice, seen: int) -> Bool[Array, "B 1 1 Q T"] | None:
    """Returns which of the first `seen` keys the queries of `part` see, the same for all heads (B may be 1)."""
    visible = None
    if causal:
        visible = (jnp.arange(seen) <= jnp.arange(part.start, part.stop)[:, None])[None]
    if segment_ids is not None:
        same = segment_ids[:, part, None] == segment_ids[:, None, :seen]
        visible = same if visible is None else visible & same
    return None if visible is None else visible[:, None, None]


def _scores(q: Array, k: Array) -> Array:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bkgqc,bktc->bkgqt", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(
    causal: bool,
    q: Float[Array, "B K G S C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    segment_ids: Int[Array, "B S"] | None,
) -> Float[Array, "B K G S C"]:
    return _forward(causal, q, k, v, segment_ids)[0]


def _forward(causal: bool, q: Array, k: Array, v: Array, segment_ids: Array | None) -> tuple[Array, tuple]:
    outputs, logs = [], []
    for part in _parts(q.shape[3]):
        seen = part.stop if causal else k.shape[2]
        scores = _scores(q[..., part, :], k[:, :, :seen])
        visible = _visible(causal, segment_ids, part, seen)
        if visible is not None:
            scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        y = jnp.einsum("bkgqt,bktc->bkgqc", weights.astype(v.dtype), v[:, :, :seen], preferred_element_type=total.dtype)
        outputs.append((y / total).astype(q.dtype))
        logs.append(highest + jnp.log(total))
    y = checkpoint_name(jnp.concatenate(outputs, axis=3), ATTENTION)
    log = checkpoint_name(jnp.concatenate(logs, axis=3), ATTENTION)
    return y, (q, k, v, segment_ids, y, log)


def _backward(causal: bool, saved: tuple, dy: Array) -> tuple:
    q, k, v, segment_ids, y, log = saved
    # What every score's gradient is compared with: the mean of its row, which is the row sum of y * dy.
    mean = (y.astype(log.dtype) * dy.astype(log.dtype)).sum(axis=-1, keepdims=True)
    dqs, dk, dv = [], jnp.zeros(k.shape, log.dtype), jnp.zeros(v.shape, log.dtype)
    for part in _parts(q.shape[3]):
        seen = part.stop if causal else k.shape[2]
        keys, values, queries, dys = k[:, :, :seen], v[:, :, :seen], q[..., part, :], dy[..., part, :]
        weights = jnp.exp(_scores(queries, keys) - log[..., part, :])
        visible = _visible(causal, segment_ids, part, seen)
        if visible is not None:
            weights = jnp.where(visible, weights, 0)
        dweights = jnp.einsum("bkgqc,bktc->bkgqt", dys, values, preferred_element_type=log.dtype)
        dscores = (weights * (dweights - mean[..., part, :])).astype(q.dtype)
        weights = weights.astype(dy.dtype)
        dqs.append(jnp.einsum("bkgqt,bktc->bkgqc", dscores, keys, preferred_element_type=log.dtype))
        dk = dk.at[:, :, :seen].add(jnp.einsum("bkgqt,bkgqc->bktc", dscores, queries, preferred_element_type=log.dtype))
        dv = dv.at[:, :, :seen].add(jnp.einsum("bkgqt,bkgqc->bktc", weights, dys, preferred_element_type=log.dtype))
    scale = q.shape[-1] ** -0.5
    dq = (jnp.concatenate(dqs, axis=3) * scale).astype(q.dtype)
    return dq, (dk * scale).astype(k.dtype), dv.astype(v.dtype), None


_blocks.defvjp(_forward, _backward)
