"""Next-token cross-entropy that never holds the logits of a whole row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mole_jax.model.decoder import Decoder

CHUNK = 512
"""Most positions of a row whose logits exist at a time."""


def token_losses(
    decoder: Decoder, hidden: Float[Array, "B S D"], targets: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Returns the negative log-likelihood of each target, in nats, float32, and whether none is likelier.

    Logits are made, used and dropped a chunk of the sequence at a time: at S = 2048 and V = 32,000 the whole of them
    would take 250 MiB per row. On a mesh with a tensor axis a device holds its part of the vocabulary.

    Where the head is not trained, the backward pass does not make them again: a token's gradient by its own hidden
    state needs nothing of what follows but a factor, so it is computed beside the loss.
    """
    length = hidden.shape[1]
    chunks = next(n for n in range(1, length + 1) if length % n == 0 and length // n <= CHUNK)

    matrix = decoder.head_matrix(hidden.dtype)  # once, not once a chunk

    def losses(hidden: Array, targets: Array) -> tuple[Array, Array]:
        return _losses(decoder.logits, hidden, matrix, targets)

    if chunks == 1:
        return losses(hidden, targets)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    pieces = jax.lax.map(lambda pair: losses(*pair), (split(hidden), split(targets)))
    return jax.tree.map(lambda piece: jnp.moveaxis(piece, 0, 1).reshape(targets.shape), pieces)


Logits = Callable[[Array, Array], Array]
"""From hidden states (B, S, D) and the head's matrix (D, V) to logits (B, S, V)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(
    logits: Logits, hidden: Float[Array, "B S D"], matrix: Float[Array, "D V"], targets: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    return _of_logits(logits(hidden, matrix), targets)


def _of_logits(logits: Float[Array, "B S V"], targets: Int[Array, "B S"]) -> tuple[Array, Array]:
    # Picked by comparison and not by index: each device of the tensor axis looks at its part of the vocabulary.
    chosen = jnp.where(_is_target(logits, targets), logits, 0).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen, chosen >= logits.max(axis=-1)


def _is_target(logits: Array, targets: Array) -> Bool[Array, "B S V"]:
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def _forward(logits: Logits, hidden: Any, matrix: Any, targets: Any) -> tuple[tuple[Array, Array], tuple]:
    """Keeps each token's gradient by its hidden state (B, S, D); with a trained head, what makes all of it again."""
    given = hidden.value, matrix.value, targets.value
    if matrix.perturbed:
        return _losses(logits, *given), (None, given)
    made, pull = jax.vjp(lambda hidden: logits(hidden, given[1]), given[0])
    results = _of_logits(made, given[2])
    (gradient,) = pull(jax.nn.softmax(made, axis=-1) - _is_target(made, given[2]))
    return results, (gradient, None)


def _backward(logits: Logits, saved: tuple, cotangents: tuple[Array, Any]) -> tuple[Array, Array | None, None]:
    gradient, given = saved
    factor = cotangents[0]
    if given is None:
        return (gradient * factor[..., None]).astype(gradient.dtype), None, None
    hidden, matrix, targets = given
    _, pull = jax.vjp(lambda *both: _of_logits(logits(*both), targets)[0], hidden, matrix)
    return *pull(factor), None


_losses.defvjp(_forward, _backward, symbolic_zeros=True)
