"""Attention on GPUs: tokamax's flash kernels, told each query's first key instead of an S x S mask."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mole_jax import compat
from mole_jax.model.kernels.saved import ATTENTION

Name = Literal["triton", "mosaic"]


def attend(
    q: Float[Array, "B H S C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    segment_ids: Int[Array, "B S"] | None,
    causal: bool,
    *,
    kernel: Name,
) -> Float[Array, "B H S C"]:
    """See `mole_jax.model.attention.attention`; segments must be causal."""
    assert causal or segment_ids is None, "the kernels are told where a query's keys begin, not where they end"
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    starts = None if segment_ids is None else first_keys(segment_ids)[:, None]
    return _attend(kernel, causal, q, k, v, starts).swapaxes(1, 2)


def first_keys(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Returns where each token's segment begins; the tokens of a segment stand side by side."""
    new = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(new, jnp.arange(segment_ids.shape[1]), 0), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel: Name, causal: bool, q: Array, k: Array, v: Array, k_start: Array | None) -> Array:
    return _forward(kernel, causal, q, k, v, k_start)[0]


def _forward(kernel: Name, causal: bool, q: Array, k: Array, v: Array, k_start: Array | None) -> tuple[Array, tuple]:
    y, residuals = compat.tokamax_attention(kernel)[0](q, k, v, k_start, causal)
    y, residuals = checkpoint_name((y, residuals), ATTENTION)
    return y, (q, k, v, k_start, y, residuals)


def _backward(kernel: Name, causal: bool, saved: tuple, dy: Array) -> tuple:
    q, k, v, k_start, y, residuals = saved
    return (*compat.tokamax_attention(kernel)[1](q, k, v, k_start, causal, y, residuals, dy), None)


_attend.defvjp(_forward, _backward)
