"""Dropout's masks against what independent draws give, beside `jax.random.bernoulli` and a generator that fails."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.adapters.dropout import Draw, draw, dropout, kept

TOKENS, CHANNELS = 512, 1024


def ours(seed: int, rate: float) -> np.ndarray:
    drawn = draw(jax.random.key(seed), 1, TOKENS, {"mlp": CHANNELS})
    return np.asarray(kept(drawn.tokens[0], drawn.channels["mlp"], rate))


def bernoulli(seed: int, rate: float) -> np.ndarray:
    return np.asarray(jax.random.bernoulli(jax.random.key(seed), 1 - rate, (TOKENS, CHANNELS)))


def unmixed(seed: int, rate: float) -> np.ndarray:
    drawn = draw(jax.random.key(seed), 1, TOKENS, {"mlp": CHANNELS})
    return np.asarray(drawn.tokens[0, :, None] ^ drawn.channels["mlp"]) >= np.uint32(rate * 2**32)


def deviations(mask: np.ndarray, rate: float) -> dict[str, float]:
    """Returns statistics that are standard normal if all elements are independent."""
    x = (mask - (1 - rate)) / np.sqrt(rate * (1 - rate))
    rows, columns = (np.corrcoef(one)[np.triu_indices(len(one), 1)] for one in (x, x.T))
    # The product of the four corners of rectangles has mean 0 and variance 1.
    corners = x[0::2, 0::2] * x[1::2, 0::2] * x[0::2, 1::2] * x[1::2, 1::2]
    shifted = {f"shifted by {lag} along {axis}": x * np.roll(x, lag, axis) for axis in (0, 1) for lag in (1, 2, 64)}
    return {
        "share": x.mean() * np.sqrt(x.size),
        "shares of rows": (np.square(x.mean(axis=1)).sum() * CHANNELS - TOKENS) / np.sqrt(2 * TOKENS),
        "shares of columns": (np.square(x.mean(axis=0)).sum() * TOKENS - CHANNELS) / np.sqrt(2 * CHANNELS),
        # A correlation of n pairs has mean square 1 / (n - 1), its square √2 times that as standard deviation.
        "pairs of rows": (np.square(rows).mean() * (CHANNELS - 1) - 1) * np.sqrt(len(rows) / 2),
        "pairs of columns": (np.square(columns).mean() * (TOKENS - 1) - 1) * np.sqrt(len(columns) / 2),
        "corners": corners.mean() * np.sqrt(corners.size),
        **{name: one.mean() * np.sqrt(x.size) for name, one in shifted.items()},
    }


@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize("generator", [ours, bernoulli])
def test_masks_look_independent(generator, rate):
    for seed in range(2):
        found = deviations(generator(seed, rate), rate)
        # A normal number is beyond 5 once in 1.7 million.
        assert max(map(abs, found.values())) < 5, found


def test_words_that_are_not_mixed_do_not():
    assert abs(deviations(unmixed(0, 0.5), 0.5)["corners"]) > 50


def test_layers_and_inputs_have_masks_of_their_own():
    widths = {"mlp": CHANNELS, "hidden": CHANNELS}
    first, second = (draw(key, 1, TOKENS, widths) for key in jax.random.split(jax.random.key(0)))
    masks = [
        np.asarray(kept(one.tokens[0], one.channels[name], 0.5), np.float64) * 2 - 1
        for one, name in ((first, "mlp"), (first, "hidden"), (second, "mlp"))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[i] * masks[j]).mean()) * np.sqrt(masks[i].size) < 5


def test_what_is_dropped_is_zero_the_rest_is_scaled_and_gradients_likewise():
    drawn = draw(jax.random.key(1), 4, 50, {"mlp": 200})
    mask = np.asarray(kept(drawn.tokens, drawn.channels["mlp"], 0.3))
    assert mask.shape == (4, 50, 200)
    x, dy = np.random.default_rng(0).standard_normal((2, *mask.shape)).astype(np.float32)
    y, pull = jax.vjp(lambda x: dropout(x, 0.3, drawn, "mlp"), jnp.asarray(x))
    np.testing.assert_allclose(y, np.where(mask, x / 0.7, 0), rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.asarray(dy))[0], np.where(mask, dy / 0.7, 0), rtol=1e-6)


def test_a_token_keeps_its_mask_wherever_it_stands():
    drawn = draw(jax.random.key(2), 2, 8, {"mlp": 32})
    order = np.random.default_rng(0).permutation(8)
    x = jnp.ones((2, 8, 32))
    moved = Draw(drawn.tokens[:, order], drawn.channels)
    np.testing.assert_array_equal(dropout(x, 0.5, moved, "mlp"), dropout(x, 0.5, drawn, "mlp")[:, order])


def test_nothing_is_dropped_without_words_or_at_rate_0():
    x = jnp.ones((1, 2, 3))
    assert dropout(x, 0.5, None, "mlp") is x
    assert dropout(x, 0, draw(jax.random.key(0), 1, 2, {"mlp": 3}), "mlp") is x
