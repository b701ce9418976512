"""The cache: attention over it against its definition, and rows that come, go and are read in pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.adapters.build import Adapters
from mole_jax.config import AdapterConfig
from mole_jax.model import cached_attention as module
from mole_jax.model.architecture import PRESETS
from mole_jax.model.cached_attention import LayerCache, cached_attention
from mole_jax.model.decoder import Decoder
from mole_jax.parameters import Declare, DecoderParam, streams
from tests.model.test_attention import HEADS, KV_HEADS, ROWS, WIDTH, by_definition, drawn, same

LAYERS, SLOTS = 3, 9


@pytest.mark.parametrize("one_product", [True, False])
@pytest.mark.parametrize("length", [1, 3])
def test_rows_start_at_their_own_slots(length, one_product, monkeypatch):
    """Grouped heads, the middle layer, by either product: what is written is read, other layers stay."""
    monkeypatch.setattr(module, "one_product_pays", lambda: one_product)
    heads, _, _ = drawn(length, SLOTS)
    q = heads.swapaxes(1, 2)
    keys = jax.random.split(jax.random.key(1), 4)
    old = [np.array(jax.random.normal(key, (LAYERS, ROWS, SLOTS, KV_HEADS, WIDTH))) for key in keys[:2]]
    new = [jax.random.normal(key, (ROWS, length, KV_HEADS, WIDTH)) for key in keys[2:]]
    slots = np.array([0, 4])

    @jax.jit
    def run(q, k, v, new, slots):
        cache = LayerCache(k, v, jnp.int32(1)).write(new[0], new[1], slots)
        return cached_attention(q, cache, slots), cache

    flat = [one.reshape(LAYERS, ROWS, SLOTS, -1) for one in old]
    found, cache = run(q, *flat, new, slots)
    for whole, piece, got in zip(old, new, (cache.k, cache.v), strict=True):
        for row, slot in enumerate(slots):
            whole[1, row, slot : slot + length] = piece[row]
        np.testing.assert_array_equal(got, whole.reshape(got.shape))
    k, v = (jnp.asarray(one[1]).swapaxes(1, 2) for one in old)
    assert heads.shape[1] == HEADS
    same(found, by_definition(heads, k, v, lambda row, i: list(range(slots[row] + i + 1))))


def test_what_lies_past_the_last_slot_is_dropped():
    old = jnp.zeros((1, 2, 4, 6))
    new = jnp.ones((2, 3, 2, 3))
    cache = LayerCache(old, old, jnp.int32(0)).write(new, new, jnp.array([0, 3]))
    np.testing.assert_array_equal(cache.k[0, :, :, 0], [[1, 1, 1, 0], [0, 0, 0, 1]])


@pytest.fixture(scope="module", params=["token", "instance"])
def decoder(request):
    config = AdapterConfig(rank=2, experts=4, route_by=request.param)
    model = Decoder(Declare(DecoderParam, streams(0)), PRESETS["tiny"].decoder, Adapters(config))
    graph, state = nnx.split(model)
    # A fresh adapter changes nothing; here the choice of experts must matter.
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [one + 0.3 * jax.random.normal(key, one.shape) for one, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, noisy))


def embedded(rows: int, length: int, seed: int):
    return jax.random.normal(jax.random.key(seed), (rows, length, PRESETS["tiny"].decoder.width))


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("piece", [4, 5, 12])
def test_a_prompt_read_in_pieces_gives_the_same(decoder, piece):
    """Rows of unequal length, one that ends in the first piece; then one more token."""
    x, lengths = embedded(3, 13, 1), jnp.array([13, 3, 8])
    empty = decoder.empty_cache(3, 16, jnp.dtype("float32"))
    whole, cache = decoder.cached(x, empty, lengths)
    found, pieces = decoder.cached(x, empty, lengths, piece=piece)
    for row, length in enumerate(lengths):
        close(found[row, :length], whole[row, :length])
    np.testing.assert_array_equal(pieces.length, lengths)
    token, one = embedded(3, 1, 2), jnp.ones(3, jnp.int32)
    close(decoder.cached(token, pieces, one)[0], decoder.cached(token, cache, one)[0])


def test_a_row_is_emptied_and_filled_while_others_go_on(decoder):
    """Against each prompt alone in a cache of its own."""

    def alone(prompt, *tokens):
        cache = decoder.empty_cache(1, 12, jnp.dtype("float32"))
        hidden, cache = decoder.cached(prompt, cache, jnp.array([prompt.shape[1]]))
        found = [hidden[:, -1]]
        for token in tokens:
            hidden, cache = decoder.cached(token, cache, jnp.ones(1, jnp.int32))
            found.append(hidden[:, -1])
        return jnp.concatenate(found)

    x, later = embedded(2, 7, 1), embedded(1, 5, 2)
    tokens = [embedded(2, 1, seed) for seed in (3, 4)]
    cache = decoder.empty_cache(2, 12, jnp.dtype("float32"))
    _, cache = decoder.cached(x, cache, jnp.array([7, 4]))
    first, cache = decoder.cached(tokens[0], cache, jnp.ones(2, jnp.int32))
    # The second row's prompt makes room for another, while the first keeps what it has.
    cache = cache.emptied(jnp.array([False, True]))
    filled, cache = decoder.cached(jnp.concatenate([jnp.zeros_like(later), later]), cache, jnp.array([0, 5]))
    second, cache = decoder.cached(tokens[1], cache, jnp.ones(2, jnp.int32))
    np.testing.assert_array_equal(cache.length, [9, 6])
    close(jnp.stack([first[0, 0], second[0, 0]]), alone(x[:1], tokens[0][:1], tokens[1][:1])[1:])
    close(jnp.stack([filled[1, -1], second[1, 0]]), alone(later, tokens[1][1:]))
