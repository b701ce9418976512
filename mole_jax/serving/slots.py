"""A fixed number of answers under way, each in a slot of its own: one ends and another begins while the rest go on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from mole_jax.config import DecodingConfig
from mole_jax.model.decoder import CACHE_AXES, Cache, Decoder
from mole_jax.model.llava import Llava
from mole_jax.parallel.mesh import batch_shards
from mole_jax.parallel.sharding import batch_sharding, partition, replicated
from mole_jax.parameters import Tree
from mole_jax.serving.decode import read
from mole_jax.serving.draw import Settings, next_token
from mole_jax.serving.sampler import Prompt, Sampler, bucket, pad

SHORTEST = 128
"""Prompts are padded to at least so many tokens: fewer shapes to compile, and reading so few takes no longer."""


class Rows(NamedTuple):
    """Where each of S answers stands."""

    seen: Bool[Array, "S V"]
    """Text tokens of the prompt and the answer."""
    token: Int[Array, " S"]
    """The newest token."""
    count: Int[Array, " S"]
    """New tokens so far."""
    settings: Settings


class State(NamedTuple):
    """What the device holds of all slots, free ones too."""

    cache: Cache
    """Keys and values of the prompts and of all new tokens but the last."""
    rows: Rows


class Drawn(NamedTuple):
    """New tokens, one for each of some rows."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    """Of each token, as the model has it: before penalty, temperature and the limits on what is drawn."""


class Programs(NamedTuple):
    """`jax.jit` functions, compiled once per shape; the model's graph and the type are static."""

    empty: Callable[..., State]
    """``(graph, dtype, slots, places, weights) -> State``"""
    fill: Callable[..., tuple[State, Drawn]]
    """``(graph, dtype, weights, state, prompt, settings, slot)``: the first of the prompts goes into the slot."""
    step: Callable[..., tuple[State, Drawn]]
    """``(graph, dtype, weights, state, active)``: one more token for the slots that are active."""


@functools.cache
def programs(mesh: Mesh) -> Programs:
    """Returns the programs on a mesh."""
    rows, kv = batch_sharding(mesh), NamedSharding(mesh, partition(*CACHE_AXES))
    state = State(Cache(kv, kv, rows, rows), rows)  # pyright: ignore[reportArgumentType]
    both, static = (state, replicated(mesh)), ("graph", "dtype")
    return Programs(
        jax.jit(_empty, static_argnames=(*static, "slots", "places"), out_shardings=state),
        jax.jit(_fill, static_argnames=static, donate_argnames="state", out_shardings=both),
        jax.jit(_step, static_argnames=static, donate_argnames="state", out_shardings=both),
    )


class Slots:
    """The slots of a model. One thread at a time may use them.

    Attributes:
      count: how many there are: as many as were asked for, rounded up to what the mesh divides.
      places: tokens of a prompt and its answer that a slot has room for.
    """

    def __init__(self, sampler: Sampler, weights: Tree, count: int, places: int):
        """Makes them free; `weights` are those of `Sampler.weights`."""
        self._sampler, self._weights = sampler, weights
        self._shards = batch_shards(sampler.mesh)
        self._run = programs(sampler.mesh)
        self.count, self.places = -(-count // self._shards) * self._shards, places
        self.clear()

    def clear(self) -> None:
        """Frees all slots, also after an error that has taken their arrays along."""
        with jax.set_mesh(self._sampler.mesh):
            self._state = self._run.empty(**self._model, slots=self.count, places=self.places)

    @property
    def nbytes(self) -> int:
        """Memory of the cache, all devices together."""
        return self._state.cache.k.nbytes + self._state.cache.v.nbytes

    def fill(self, slot: int, prompt: Prompt, decoding: DecodingConfig) -> Drawn:
        """Reads a prompt into a slot and returns the first token of its answer, of which the device is not waited for.

        Args:
            slot: from 0.
            prompt: has at most `places` tokens; its number is that of its draws, 0 if it has none.
            decoding: how it is answered. The longest answer and stop texts are the caller's to keep.
        """
        width = min(bucket(max(len(prompt.tokens), SHORTEST)), self.places)
        arrays = pad([prompt], self._shards, self._sampler.tile_features, width)
        settings = Settings.of([decoding], [prompt.number or 0])
        arrays = jax.device_put(arrays, batch_sharding(self._sampler.mesh))
        with jax.set_mesh(self._sampler.mesh):
            self._state, drawn = self._run.fill(
                **self._model, state=self._state, prompt=arrays, settings=settings, slot=np.int32(slot)
            )
        return drawn

    def step(self, active: Bool[np.ndarray, " S"]) -> Drawn:
        """Returns one more token for each slot (of those that are not active, nothing of use); waits for nothing."""
        with jax.set_mesh(self._sampler.mesh):
            self._state, drawn = self._run.step(**self._model, state=self._state, active=active)
        return drawn

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """Compiles what prompts of these shapes need; the slots are free afterwards."""
        for prompt in prompts:
            self.fill(0, prompt, DecodingConfig())
        jax.block_until_ready(self.step(np.zeros(self.count, bool)))
        self.clear()

    @property
    def _model(self) -> dict:
        return {"graph": self._sampler.graph, "dtype": self._sampler.dtype, "weights": self._weights}


def _empty(graph: nnx.GraphDef, dtype: jnp.dtype, slots: int, places: int, weights: Tree) -> State:
    decoder: Decoder = nnx.merge(graph, weights).decoder
    seen, nothing = jnp.zeros((slots, decoder.arch.vocab), bool), jnp.zeros(slots, jnp.int32)
    settings = jax.tree.map(jnp.asarray, Settings.of([DecodingConfig()] * slots, [0] * slots))
    return State(decoder.empty_cache(slots, places, dtype), Rows(seen, nothing, nothing, settings))


def _fill(
    graph: nnx.GraphDef,
    dtype: jnp.dtype,
    weights: Tree,
    state: State,
    prompt: dict[str, Array],
    settings: Settings,
    slot: Int[Array, ""],
) -> tuple[State, Drawn]:
    model: Llava = nnx.merge(graph, weights)
    new, seen, logits = read(model, prompt, dtype, 0)
    nothing = jnp.zeros(1, jnp.int32)
    rows, drawn = _draw(Rows(seen[:1], nothing, nothing, settings), logits[:1])

    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new[:1], slot, axis=0)

    def put_places(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(old, new[:, :1], (0, slot, 0, 0))

    old = state.cache
    cache = Cache(
        put_places(old.k, new.k), put_places(old.v, new.v), put(old.length, new.length), put(old.memory, new.memory)
    )
    return State(cache, jax.tree.map(put, state.rows, rows)), drawn


def _step(
    graph: nnx.GraphDef, dtype: jnp.dtype, weights: Tree, state: State, active: Bool[Array, " S"]
) -> tuple[State, Drawn]:
    decoder: Decoder = nnx.merge(graph, weights).decoder
    rows, settings = state.rows, state.rows.settings
    x = decoder.embed(rows.token[:, None], dtype)
    hidden, cache = decoder.cached(x, state.cache, active.astype(jnp.int32))
    # A slot that is free must not have the vocabulary sorted for it.
    drawing = settings._replace(temperature=jnp.where(active, settings.temperature, 0))
    rows, drawn = _draw(rows._replace(settings=drawing), decoder.logits(hidden[:, 0]))
    return State(cache, rows._replace(settings=settings)), drawn


def _draw(rows: Rows, logits: Float[Array, "S V"]) -> tuple[Rows, Drawn]:
    token = next_token(logits, rows.seen, rows.settings, rows.count)
    each = jnp.arange(len(token))
    logprobs = jax.nn.log_softmax(logits)[each, token]
    rows = rows._replace(seen=rows.seen.at[each, token].set(True), token=token, count=rows.count + 1)
    return rows, Drawn(token, logprobs)
