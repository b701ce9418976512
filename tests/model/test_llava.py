"""Properties of the model that no outside value covers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.adapters.build import Adapters
from mole_jax.config import AdapterConfig
from mole_jax.model.architecture import PRESETS, RopeScaling
from mole_jax.model.llava import Llava
from mole_jax.model.rotary import frequencies
from mole_jax.parameters import streams

TINY = PRESETS["tiny"]


def model(arch=TINY, **adapter) -> Llava:
    return Llava(arch, Adapters(AdapterConfig(**{"rank": 2, **adapter})), streams(0))


def row(arch=TINY, images=1, text=5):
    tokens = np.concatenate([[1], np.full(images * arch.image_span, arch.image_token_id), np.arange(3, 3 + text)])
    positions = np.arange(len(tokens))[None]
    return jnp.asarray(tokens, jnp.int32)[None], jnp.asarray(positions), jnp.ones((1, len(tokens)), jnp.int32)


@pytest.fixture
def image():
    return jax.random.randint(jax.random.key(0), (1, 1, 28, 28, 3), 0, 256).astype(jnp.uint8)


@pytest.mark.parametrize("gradient", ["none", "straight_through", "gate_scaled", "dense"])
def test_fresh_adapters_change_no_bit(image, gradient):
    """B starts at zero, so the adapted model is its base (method.md, the block)."""
    tokens, positions, segments = row()
    plain = model(kind="none")(tokens, image, positions, segments)
    adapted_model = model(kind="mole", router_gradient=gradient)
    base = nnx.state(model(kind="none"))
    nnx.update(adapted_model, base)
    adapted = adapted_model(tokens, image, positions, segments)
    np.testing.assert_array_equal(adapted, plain)


@pytest.mark.parametrize("kind", ["lora", "mole"])
def test_every_target_moves_the_logits(image, kind):
    tokens, positions, segments = row()
    graph, state = nnx.split(model(kind=kind))

    @jax.jit
    def logits(state):
        return nnx.merge(graph, state)(tokens, image, positions, segments)

    before = logits(state)
    adapters = [path for path, _ in nnx.to_flat_state(state) if path[-2:] == ("adapter", "b")]
    assert len(adapters) == 7
    for path in adapters:
        changed = [
            (p, leaf.replace(jnp.ones_like(leaf[...])) if p == path else leaf) for p, leaf in nnx.to_flat_state(state)
        ]
        assert np.abs(logits(nnx.from_flat_state(changed)) - before).max() > 1e-4, path


def test_a_batch_of_text_does_not_run_the_vision_tower():
    """Pixels of NaN would reach the output if it did (or would be multiplied by zero, which is NaN too)."""
    tokens, positions, segments = row(images=0)
    poison = jnp.full((1, 1, 28, 28, 3), jnp.nan, jnp.float32)
    clean = model()(tokens, jnp.zeros((1, 0, 28, 28, 3)), positions, segments)
    np.testing.assert_array_equal(model()(tokens, poison, positions, segments), clean)


def test_images_go_to_their_places_in_order(image):
    """Two images in one row: the first span sees the first one only, and unused slots are not seen."""
    other = 255 - image
    tokens, *_ = row(images=2)
    both = jnp.concatenate([image, other, image], axis=1)
    changed = jnp.concatenate([image, image, other], axis=1)
    embedded, embedded_changed = (model().embed(tokens, images, jnp.float32) for images in (both, changed))
    span = TINY.image_span
    np.testing.assert_array_equal(embedded[:, : 1 + span], embedded_changed[:, : 1 + span])
    assert np.abs(embedded - embedded_changed)[:, 1 + span : 1 + 2 * span].max() > 1e-3
    unused = jnp.concatenate([image, other, other], axis=1)
    np.testing.assert_array_equal(embedded, model().embed(tokens, unused, jnp.float32))


def test_image_vectors_and_class_token_widen_the_span(image):
    arch = dataclasses.replace(TINY, image_vectors=True, feature_select="full")
    assert arch.image_span == TINY.vision.patches + 1 + 2
    wide = model(arch)
    tokens, _, _ = row(arch)
    embedded = wide.embed(tokens, image, jnp.float32)[0]
    np.testing.assert_array_equal(embedded[1], wide.image_vectors.start[...])
    np.testing.assert_array_equal(embedded[arch.image_span], wide.image_vectors.end[...])
    np.testing.assert_array_equal(embedded[0], wide.decoder.embedding[...][1])


def test_remat_changes_no_value(image):
    tokens, positions, segments = row()
    adapted = model()

    def loss(state, remat):
        merged = nnx.merge(nnx.graphdef(adapted), state)
        return merged.hidden(tokens, image, positions, segments, remat=remat)[0].sum()

    state = nnx.state(adapted)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(state, "none")
    for remat in ("most", "attention", "full"):
        again = gradient(state, remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_llama3_rope_scaling_by_its_definition():
    """Wavelengths over 8192/1 positions are slowed 8 times, under 8192/4 kept (Llama 3.1's released config)."""
    arch = dataclasses.replace(
        PRESETS["vicuna-7b"].decoder, rope_theta=500_000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)
    )
    plain = frequencies(dataclasses.replace(arch, rope_scaling=None))
    scaled = frequencies(arch)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    between = (wavelength < 8192) & (wavelength > 8192 / 4)
    smooth = (8192 / wavelength[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between])
    assert between.sum() > 2
