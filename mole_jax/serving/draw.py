"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in this order (transformers')."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from mole_jax.config import DecodingConfig


class Settings(NamedTuple):
    """How each row of a batch is decoded. Values, not constants of the program: changing them compiles nothing."""

    max_new_tokens: Int[np.ndarray, " B"]
    temperature: Float[np.ndarray, " B"]
    top_k: Int[np.ndarray, " B"]
    """0: all tokens."""
    top_p: Float[np.ndarray, " B"]
    repetition_penalty: Float[np.ndarray, " B"]
    seed: UInt[np.ndarray, "B 2"]
    """What a row's draws are made from: the setting's seed and the prompt's number."""

    @classmethod
    def of(cls, decoding: Sequence[DecodingConfig], numbers: Sequence[int]) -> Settings:
        """Returns the settings of one row for each of `decoding`; `numbers` tell rows of the same seed apart."""
        return cls(
            max_new_tokens=np.asarray([one.max_new_tokens for one in decoding], np.int32),
            temperature=np.asarray([one.temperature for one in decoding], np.float32),
            top_k=np.asarray([one.top_k or 0 for one in decoding], np.int32),
            top_p=np.asarray([one.top_p for one in decoding], np.float32),
            repetition_penalty=np.asarray([one.repetition_penalty for one in decoding], np.float32),
            seed=np.asarray([[one.seed, number] for one, number in zip(decoding, numbers, strict=True)], np.uint32),
        )


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Divides the positive logits of `seen` tokens by the penalty and multiplies the negative (arXiv 1909.05858)."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(
    logits: Float[Array, "B V"], temperature: Float[Array, " B"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> tuple[Int[Array, "B V"], Float[Array, "B V"]]:
    """Returns the tokens from the most to the least probable, and their scaled logits: -inf where one is excluded.

    Top-k keeps what is at least as probable as the k-th token. Top-p keeps, of these, the fewest that have
    probability `top_p` together, at least one. A temperature of 0 counts as 1.
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    tokens = jnp.argsort(-scaled, axis=-1)
    falling = jnp.take_along_axis(scaled, tokens, axis=-1)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1]) - 1
    falling = jnp.where(falling < jnp.take_along_axis(falling, last[:, None], axis=-1), -jnp.inf, falling)
    probability = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The sum of all but the last may round to 1, so that no limit is not the same as the limit 1.
    outside = (before >= top_p[:, None]) & (top_p[:, None] < 1) & (jnp.arange(logits.shape[-1]) > 0)
    return tokens, jnp.where(outside, -jnp.inf, falling)


def next_token(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    settings: Settings,
    count: Int[Array, ""] | Int[Array, " B"],
) -> Int[Array, " B"]:
    """Returns each row's next token, of which `count` are there already; greedy where the temperature is 0."""
    logits = penalise(logits, seen, jnp.asarray(settings.repetition_penalty))
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: Array) -> Array:
        limits = map(jnp.asarray, (settings.temperature, settings.top_k, settings.top_p))
        tokens, scaled = candidates(logits, *limits)

        def one(seed: Array, count: Array, scaled: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
            return jax.random.categorical(jax.random.fold_in(key, count), scaled)

        place = jax.vmap(one)(jnp.asarray(settings.seed), jnp.broadcast_to(count, len(scaled)), scaled)
        drawn = jnp.take_along_axis(tokens, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
        return jnp.where(settings.temperature > 0, drawn, greedy)

    # Sorting the vocabulary is worth avoiding where nobody draws.
    return jax.lax.cond((settings.temperature > 0).any(), draw, lambda _: greedy, logits)
