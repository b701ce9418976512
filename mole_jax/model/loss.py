"""Next-token cross-entropy that never holds the logits of a whole row."""

from __future__ import annotations

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

    Logits are made, used and dropped (also by the backward pass) a chunk of the sequence at a time: at
    S = 2048 and V = 32,000 the whole of them would take 250 MiB per row. On a mesh with a tensor axis a device
    holds its part of the vocabulary.
    """
    length = hidden.shape[1]
    chunks = next(n for n in range(1, length + 1) if length % n == 0 and length // n <= CHUNK)

    matrix = decoder.head_matrix(hidden.dtype)  # once, not once a chunk

    @jax.checkpoint
    def losses(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = decoder.logits(hidden, matrix)
        # Picked by comparison and not by index: each device of the tensor axis looks at its part of the vocabulary.
        chosen = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - chosen, chosen >= logits.max(axis=-1)

    if chunks == 1:
        return losses(hidden, targets)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    pieces = jax.lax.map(lambda pair: losses(*pair), (split(hidden), split(targets)))
    return jax.tree.map(lambda piece: jnp.moveaxis(piece, 0, 1).reshape(targets.shape), pieces)
