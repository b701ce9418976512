"""The two compiled programs of generation: one reads the prompts, one adds tokens to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from mole_jax.model.decoder import CACHE_AXES, Cache
from mole_jax.model.llava import Llava
from mole_jax.parallel.mesh import batch_shards
from mole_jax.parallel.sharding import batch_sharding, partition, replicated
from mole_jax.parameters import Tree
from mole_jax.serving.draw import Settings, next_token

PREFILL_TOKENS = 2048
"""Tokens of prompts that a device reads at once: enough to keep it busy.

A 7B's scores over 4,096 places take 1 GiB then; without a bound they would grow with rows x length.
"""


class State(NamedTuple):
    """A batch of answers under way."""

    cache: Cache
    """Keys and values of the prompts and of all new tokens but the last."""
    seen: Bool[Array, "B V"]
    """Text tokens of the prompt and the answer."""
    tokens: Int[Array, "B N"]
    """New tokens; end-of-sequence where there are none yet, and after the end of a row."""
    count: Int[Array, ""]
    """How many of the N are made."""
    done: Bool[Array, " B"]


class Programs(NamedTuple):
    """`jax.jit` functions, compiled once per shape; the model's graph, the type and the end tokens are static."""

    prefill: Callable[..., State]
    """``(graph, dtype, eos_ids, capacity, weights, prompts, settings) -> State`` with the first token of each row."""
    extend: Callable[..., State]
    """``(graph, dtype, eos_ids, weights, state, settings, until) -> State`` with `until` tokens, or all rows done."""


@functools.cache
def programs(mesh: Mesh) -> Programs:
    """Returns the programs on a mesh. The tokens come out whole on every device, so that any process can read them."""
    rows, whole = batch_sharding(mesh), replicated(mesh)
    kv = NamedSharding(mesh, partition(*CACHE_AXES))
    out = State(Cache(kv, kv, rows, rows), rows, whole, whole, whole)  # pyright: ignore[reportArgumentType]
    static = ("graph", "dtype", "eos_ids")
    return Programs(
        jax.jit(_prefill, static_argnames=(*static, "capacity"), out_shardings=out),
        jax.jit(_extend, static_argnames=static, donate_argnames="state", out_shardings=out),
    )


def read(
    model: Llava, prompts: dict[str, Array], dtype: jnp.dtype, room: int
) -> tuple[Cache, Bool[Array, "B V"], Float[Array, "B V"]]:
    """Reads prompts, as `mole_jax.serving.sampler.pad` returns them, into a new cache with `room` places more.

    Returns:
        The cache, the text tokens of each prompt, and the logits of what comes after it.
    """
    tokens, lengths, images = prompts["tokens"], prompts["lengths"], prompts["images"]
    rows, width = tokens.shape
    # The images of all rows come in one list without gaps, so the rows are read as one for putting them in.
    sources, shares = (
        prompts[name].reshape(1, rows * width, -1) if name in prompts else None for name in ("sources", "weights")
    )
    x = model.embed(
        tokens.reshape(1, -1), images[None], dtype, sources=sources, weights=shares, every_slot=True
    ).reshape(rows, width, -1)
    cache = model.decoder.empty_cache(rows, width + room, dtype)
    piece = max(1, PREFILL_TOKENS * batch_shards(jax.sharding.get_abstract_mesh()) // rows)
    hidden, cache = model.decoder.cached(x, cache, lengths, piece=piece)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = model.decoder.logits(last)
    # Image positions hold no text: their id is no token that the answer could repeat.
    text = (jnp.arange(width) < lengths[:, None]) & (tokens != model.arch.image_token_id)
    vocab = logits.shape[-1]
    seen = jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], jnp.where(text, tokens, vocab)].set(True)
    return cache, seen, logits


def _prefill(
    graph: nnx.GraphDef,
    dtype: jnp.dtype,
    eos_ids: tuple[int, ...],
    capacity: int,
    weights: Tree,
    prompts: dict[str, Array],
    settings: Settings,
) -> State:
    cache, seen, logits = read(nnx.merge(graph, weights), prompts, dtype, capacity)
    rows = len(logits)
    new = jnp.full((rows, capacity), eos_ids[0], jnp.int32)
    return _add(State(cache, seen, new, jnp.int32(0), jnp.zeros(rows, bool)), logits, settings, eos_ids)


def _extend(
    graph: nnx.GraphDef,
    dtype: jnp.dtype,
    eos_ids: tuple[int, ...],
    weights: Tree,
    state: State,
    settings: Settings,
    until: Int[Array, ""],
) -> State:
    decoder = nnx.merge(graph, weights).decoder

    def unfinished(state: State) -> Array:
        return (state.count < until) & ~state.done.all()

    def step(state: State) -> State:
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
        hidden, cache = decoder.cached(decoder.embed(token, dtype), state.cache, jnp.ones(len(token), jnp.int32))
        return _add(state._replace(cache=cache), decoder.logits(hidden[:, 0]), settings, eos_ids)

    return jax.lax.while_loop(unfinished, step, state)


def _add(state: State, logits: Float[Array, "B V"], settings: Settings, eos_ids: tuple[int, ...]) -> State:
    token = jnp.where(state.done, eos_ids[0], next_token(logits, state.seen, settings, state.count))
    count = state.count + 1
    ended = functools.reduce(jnp.logical_or, [token == one for one in eos_ids])
    return State(
        state.cache,
        state.seen.at[jnp.arange(len(token)), token].set(True),
        jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1),
        count,
        state.done | ended | (count >= settings.max_new_tokens),
    )
