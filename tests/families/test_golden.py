"""Every family against transformers' values (goldens/families), float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.config import AdapterConfig, MeshConfig
from mole_jax.parameters import flatten, unflatten
from tests.families.conftest import plain_of
from tests.families.golden import CASES, LENGTH, batch_of, forward

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
ADAPTED = AdapterConfig(kind="mole", rank=2, alpha=4.0, dropout=0.0)
BOTH = ("llava_qwen3", "internvl")
"""Between them they have all parts: norms of queries and keys in the decoder and a tied head; biases, class token,
layer scale, pixel shuffle and tiles."""


@pytest.mark.parametrize("case", CASES)
def test_image_features_hidden_states_and_logits(plain, case):
    case = plain.golden.cases[case]
    embedded, hidden, logits = (one[0, : case.length] for one in plain.forward(plain.leaves, *batch_of([case])))
    image = case.expected["input_ids"] == plain.golden.arch.image_token_id
    if image.any():
        np.testing.assert_allclose(embedded[image], case.expected["image_features"], **TOLERANCE)
    np.testing.assert_allclose(hidden, case.expected["last_hidden_state"], **TOLERANCE)
    np.testing.assert_allclose(logits, case.expected["logits"], **TOLERANCE)


def test_greedy_continuations_are_those_of_transformers(plain):
    """All cases at once, through the cache."""
    golden, dtype = plain.golden, jnp.dtype("float32")
    cases = [golden.cases[case] for case in CASES]
    prompts = [case.expected["prompt_ids"] for case in cases]
    tokens, images, _, sources, weights = batch_of(cases)
    lengths = jnp.asarray([len(one) for one in prompts], jnp.int32)
    # Prompts are the texts' beginnings but for a space at their ends; pictures stand in the same places.
    tokens = tokens.at[:].set(jnp.asarray(np.stack([np.resize(one, LENGTH) for one in prompts]), jnp.int32))
    tokens = jnp.where(jnp.arange(LENGTH) < lengths[:, None], tokens, 0)

    @jax.jit
    def begin(leaves, tokens, lengths):
        model = nnx.merge(plain.spec.graph, leaves)
        x = model.embed(tokens, images, dtype, sources=sources, weights=weights)
        hidden, cache = model.decoder.cached(x, model.decoder.empty_cache(len(cases), LENGTH + 16, dtype), lengths)
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
        return model.decoder.logits(last)[:, 0].argmax(-1), cache

    @jax.jit
    def go_on(leaves, token, cache):
        model = nnx.merge(plain.spec.graph, leaves)
        hidden, cache = model.decoder.cached(
            model.decoder.embed(token[:, None], dtype), cache, jnp.ones(len(cases), jnp.int32)
        )
        return model.decoder.logits(hidden)[:, 0].argmax(-1), cache

    token, cache = begin(plain.leaves, tokens, lengths)
    found = [np.asarray(token)]
    for _ in range(max(len(case.expected["generated"]) for case in cases) - 1):
        token, cache = go_on(plain.leaves, token, cache)
        found.append(np.asarray(token))
    for number, case in enumerate(cases):
        expected = case.expected["generated"]
        np.testing.assert_array_equal([one[number] for one in found][: len(expected)], expected)
        assert len(expected) == 12 or expected[-1] in golden.arch.decoder.eos_ids


@pytest.mark.parametrize("name", BOTH)
def test_eight_devices_are_one(name):
    golden = plain_of(name).golden
    spec = plain_of(name).spec
    mesh, leaves = golden.place(spec, MeshConfig(data=2, fsdp=2, tensor=2))
    cases = [golden.cases[case] for case in CASES]
    with jax.set_mesh(mesh):
        _, hidden, logits = forward(spec.graph)(leaves, *batch_of(cases))
    for row, case in enumerate(cases):
        np.testing.assert_allclose(hidden[row, : case.length], case.expected["last_hidden_state"], **TOLERANCE)
        np.testing.assert_allclose(logits[row, : case.length], case.expected["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", BOTH)
def test_fresh_experts_change_no_bit_and_one_step_moves_them_all(name):
    plain = plain_of(name)
    case = plain.golden.cases["wide"]
    spec = plain.golden.spec(ADAPTED)
    _, leaves = plain.golden.place(spec)
    arguments = batch_of([case])
    target = jnp.asarray(np.roll(case.expected["input_ids"], -1))
    adapters = {path: leaf for path, leaf in flatten(leaves).items() if path.endswith("/adapter/b")}
    assert len(adapters) == 7
    run = forward(spec.graph)

    @jax.jit
    @jax.grad
    def gradient(adapters):
        whole = unflatten(flatten(leaves) | adapters)
        logits = run(whole, *arguments)[2][0, : case.length]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1).mean()

    for found, base in zip(run(leaves, *arguments), plain.forward(plain.leaves, *arguments), strict=True):
        np.testing.assert_array_equal(found[0, : case.length], base[0, : case.length])
    for path, one in gradient(adapters).items():
        assert np.isfinite(one).all(), path
        assert (np.abs(one).max(axis=(1, 2)) > 0).all(), path


def test_the_tower_does_not_run_on_slots_that_no_row_uses():
    """Pixels of NaN would reach the projector's gradient if it did, though their features go nowhere."""
    plain = plain_of("llava_next_vicuna")
    case = plain.golden.cases["wide"]
    tokens, images, lengths, sources, weights = batch_of([case])
    used = case.sources.max() // plain.golden.arch.image_span + 1
    assert used < plain.golden.slots
    poisoned = images.at[:, used:].set(jnp.nan)
    kernel = plain.leaves["projector"]["linear_1"]["kernel"]

    @jax.jit
    @jax.grad
    def gradient(kernel, images):
        projector = plain.leaves["projector"]
        projector = projector | {"linear_1": projector["linear_1"] | {"kernel": kernel}}
        leaves = plain.leaves | {"projector": projector}
        return plain.forward(leaves, tokens, images, lengths, sources, weights)[2][0, : case.length].sum()

    np.testing.assert_array_equal(gradient(kernel, poisoned), gradient(kernel, images))
    assert np.isnan(gradient(kernel, images.at[:, 0].set(jnp.nan))).any()
