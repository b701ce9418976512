"""The whole model against transformers' values (goldens/tiny_llava*), float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.config import AdapterConfig, DecodingConfig, MeshConfig
from mole_jax.model.loss import token_losses
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import unflatten
from mole_jax.serving.sampler import Prompt, Sampler
from mole_jax.weights.open import open_source, place

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


class Golden:
    def __init__(self, folder):
        source = open_source(str(folder))
        self.arch = source.architecture
        self.mesh = make_mesh(MeshConfig(data=2, fsdp=2))
        self.spec = ModelSpec.of(self.arch, AdapterConfig(kind="none"))
        self.leaves = unflatten(place(self.spec, source, self.mesh, (), "float32", 0))
        self.model = nnx.merge(self.spec.graph, self.leaves)
        self.expected = dict(np.load(folder / "expected.npz"))
        self.tokens = jnp.asarray(self.expected["input_ids"], jnp.int32)
        self.mask = self.expected["attention_mask"]
        self.pixels = jnp.asarray(self.expected["pixel_values"].transpose(0, 2, 3, 1))
        self.positions = jnp.broadcast_to(jnp.arange(self.tokens.shape[1]), self.tokens.shape)


@pytest.fixture(scope="module", params=["tiny_llava", "tiny_llava_gqa"])
def golden(request, goldens):
    return Golden(goldens / request.param)


def test_vision_hidden_states_and_image_features(golden):
    hidden = jax.jit(lambda pixels: golden.model.vision(pixels, golden.arch.feature_layer))(golden.pixels)
    np.testing.assert_allclose(hidden, golden.expected["vision_hidden_selected"], **TOLERANCE)
    features = jax.jit(golden.model.image_features)(golden.pixels)
    np.testing.assert_allclose(features, golden.expected["image_features"], **TOLERANCE)


def test_hidden_states_logits_and_loss(golden):
    @jax.jit
    def forward(tokens, images, positions, segments):
        hidden, _ = golden.model.hidden(tokens, images, positions, segments)
        return hidden, golden.model.decoder.logits(hidden)

    hidden, logits = forward(
        golden.tokens, golden.pixels[:, None], golden.positions, jnp.asarray(golden.mask, jnp.int32)
    )
    real = golden.mask == 1
    np.testing.assert_allclose(hidden[real], golden.expected["last_hidden_state"][real], **TOLERANCE)
    np.testing.assert_allclose(logits[real], golden.expected["logits"][real], **TOLERANCE)

    labels = golden.expected["labels"]
    targets = np.where(labels[:, 1:] == -100, 0, labels[:, 1:])
    losses = token_losses(golden.model.decoder, hidden[:, :-1], jnp.asarray(targets, jnp.int32))[0]
    supervised = labels[:, 1:] != -100
    np.testing.assert_allclose(losses[supervised].mean(), golden.expected["loss"], **TOLERANCE)


def test_text_without_an_image(golden):
    tokens = golden.tokens[:, :6]
    logits = golden.model(tokens, jnp.zeros((2, 0, 1, 1, 3)), golden.positions[:, :6], jnp.ones((2, 6), jnp.int32))
    np.testing.assert_allclose(logits, golden.expected["text_only_logits"], **TOLERANCE)


def test_packed_examples_do_not_see_each_other(golden):
    """Both examples in one row give the logits that each has alone."""
    lengths = golden.mask.sum(axis=1)
    rows = [golden.tokens[i, : lengths[i]] for i in range(2)]
    tokens = jnp.concatenate(rows)[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    segments = jnp.concatenate([jnp.full(n, i + 1) for i, n in enumerate(lengths)])[None]
    logits = golden.model(tokens, golden.pixels[None], positions, segments)[0]
    expected = np.concatenate([golden.expected["logits"][i, : lengths[i]] for i in range(2)])
    np.testing.assert_allclose(logits, expected, **TOLERANCE)


def test_greedy_continuation_is_that_of_transformers(golden):
    """Also with other prompts of unequal length in the batch, padded and sharded."""
    prompt = golden.expected["generate_prompt"][0].astype(np.int32)
    expected = golden.expected["generated"][0, len(prompt) :].tolist()
    # These pixels are random and already normalised, so they go in as they are.
    image = np.asarray(golden.pixels[:1])
    sampler = Sampler(
        golden.spec.graph,
        golden.mesh,
        batch_size=4,
        eos_ids=golden.arch.decoder.eos_ids,
        dtype=jnp.dtype("float32"),
        decoding=DecodingConfig(max_new_tokens=16),
    )
    short = prompt[: np.argmax(prompt == golden.arch.image_token_id)]
    prompts = [Prompt(short, image[:0]), Prompt(prompt, image), Prompt(np.tile(prompt[-7:], 12), image[:0])]
    assert sampler(golden.leaves, {}, prompts)[1] == expected
    assert sampler(golden.leaves, {}, [prompts[1]]) == [expected]
