"""Drawing a token: against transformers' processors (goldens/decoding), and by the law of large numbers."""

from __future__ import annotations

import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.config import DecodingConfig
from mole_jax.serving.draw import Settings, candidates, next_token, penalise


@pytest.fixture(scope="module")
def golden(goldens):
    return dict(np.load(goldens / "decoding" / "expected.npz"))


def test_scores_are_those_of_transformers(golden):
    for settings, logits, tokens, expected in zip(
        *(golden[name] for name in ("settings", "logits", "tokens", "scores")), strict=True
    ):
        rows, vocab = logits.shape
        temperature, top_k, top_p, penalty = (np.full(rows, value, np.float32) for value in settings)
        seen = np.zeros((rows, vocab), bool)
        np.put_along_axis(seen, tokens, True, axis=1)
        order, falling = candidates(penalise(logits, seen, penalty), temperature, top_k.astype(np.int32), top_p)
        scores = np.empty_like(falling)
        np.put_along_axis(scores, np.asarray(order), np.asarray(falling), axis=1)
        untied = [0, 1, 2]
        np.testing.assert_allclose(scores[untied], expected[untied], rtol=1e-5, err_msg=str(settings))
        # Which of equally probable tokens top-p keeps is open; how many it keeps is not.
        np.testing.assert_allclose(np.sort(scores[3]), np.sort(expected[3]), rtol=1e-5, err_msg=str(settings))


def settings_of(count, **decoding) -> Settings:
    return Settings.of([DecodingConfig(**decoding)] * count, range(count))


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probability = np.asarray([0.05, 0.4, 0.0, 0.3, 0.25])
    count = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probability)), (count, 5))
    unseen = jnp.zeros((count, 5), bool)

    def share(**decoding):
        drawn = next_token(logits, unseen, settings_of(count, **decoding), jnp.int32(3))
        return np.bincount(drawn, minlength=5) / count

    def close(found, expected):
        np.testing.assert_array_less(np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9)

    close(share(temperature=1.0), probability)
    close(share(temperature=0.5), probability**2 / (probability**2).sum())
    close(share(temperature=1.0, top_k=2), np.asarray([0, 4, 0, 3, 0]) / 7)
    close(share(temperature=1.0, top_k=0), probability)
    close(share(temperature=1.0, top_p=0.8), np.asarray([0, 0.4, 0, 0.3, 0.25]) / 0.95)
    np.testing.assert_array_equal(share(), [0, 1, 0, 0, 0])


def test_a_draw_depends_on_seed_number_and_place_only():
    logits = jax.random.normal(jax.random.key(0), (64, 300))
    unseen = jnp.zeros((64, 300), bool)

    def draw(settings, rows=slice(None), count=0):
        return np.asarray(next_token(logits[rows], unseen[rows], settings, jnp.int32(count)))

    drawn = draw(settings_of(64, temperature=1.0))
    part = Settings(*(values[5:9] for values in settings_of(64, temperature=1.0)))
    np.testing.assert_array_equal(draw(part, slice(5, 9)), drawn[5:9])
    assert (draw(settings_of(64, temperature=1.0, seed=1)) != drawn).mean() > 0.8
    assert (draw(settings_of(64, temperature=1.0), count=1) != drawn).mean() > 0.8
    other = Settings.of([DecodingConfig(temperature=1.0)] * 64, range(64, 128))
    assert (draw(other) != drawn).mean() > 0.8


def test_greedy_rows_among_others_take_the_best():
    logits = jax.random.normal(jax.random.key(1), (8, 50))
    mixed = Settings.of([DecodingConfig(temperature=float(row % 2) * 50) for row in range(8)], range(8))
    drawn = next_token(logits, jnp.zeros((8, 50), bool), mixed, jnp.int32(0))
    best = np.argmax(logits, axis=1)
    np.testing.assert_array_equal(drawn[::2], best[::2])
    assert (np.asarray(drawn) != best)[1::2].any()


@pytest.mark.torch
def test_the_goldens_are_what_transformers_says(goldens, golden, tmp_path):
    python = os.environ.get("MOLE_JAX_TORCH_PYTHON")
    if python is None:
        pytest.skip("MOLE_JAX_TORCH_PYTHON names no interpreter with torch and transformers")
    made = tmp_path / "made.npz"
    subprocess.run([python, goldens / "decoding" / "make.py", made], check=True, capture_output=True)
    for name, value in np.load(made).items():
        np.testing.assert_allclose(value, golden[name], rtol=1e-5, err_msg=name)
