"""The loss over the vocabulary against logits that are held whole, with a frozen and with a trained head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.model import loss
from mole_jax.model.loss import token_losses


class Head:
    """A decoder's head alone."""

    def __init__(self, matrix: jax.Array):
        self.matrix = matrix

    def head_matrix(self, dtype: jnp.dtype) -> jax.Array:
        return self.matrix.astype(dtype)

    def logits(self, hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)


def whole(hidden: jax.Array, matrix: jax.Array, targets: jax.Array) -> jax.Array:
    logits = (hidden @ matrix).astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [12, 3])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, chunk, trained):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    hidden, matrix = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 12, 5), (5, 17)))
    targets, weights = jnp.asarray(rng.integers(0, 17, (2, 12))), jnp.asarray(rng.normal(size=(2, 12)), jnp.float32)
    over = (0, 1) if trained else (0,)

    def ours(hidden: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        each, likeliest = token_losses(Head(matrix), hidden, targets)  # pyright: ignore[reportArgumentType]
        return (each * weights).sum(), likeliest

    def plain(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        return (whole(hidden, matrix, targets) * weights).sum()

    (value, likeliest), found = jax.jit(jax.value_and_grad(ours, over, has_aux=True))(hidden, matrix)
    expected, wanted = jax.value_and_grad(plain, over)(hidden, matrix)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(likeliest, (hidden @ matrix).argmax(axis=-1) == targets)


def products(trained: bool) -> int:
    hidden, matrix, targets = jnp.ones((1, 4, 3)), jnp.ones((3, 7)), jnp.zeros((1, 4), jnp.int32)

    def run(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        return token_losses(Head(matrix), hidden, targets)[0].sum()  # pyright: ignore[reportArgumentType]

    return str(jax.make_jaxpr(jax.grad(run, (0, 1) if trained else 0))(hidden, matrix)).count("dot_general[")


def test_a_frozen_heads_logits_are_made_once():
    # Logits and their gradient by the hidden states; a trained head makes the logits again and has a gradient itself.
    assert (products(trained=False), products(trained=True)) == (2, 4)
