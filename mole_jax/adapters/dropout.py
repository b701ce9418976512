"""Dropout before adapters, from two short rows of random words in place of a random word for every element.

An element's word is mixed from its token's word and its channel's, where it is used. So nothing of the size of the
activations is drawn, stored or sent, and the masks depend neither on the mesh nor on the order of the tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32


class Draw(NamedTuple):
    """The random words of one layer."""

    tokens: UInt32[Array, "B S"]
    channels: dict[str, UInt32[Array, " I"]]
    """By the name of the input (`mole_jax.model.decoder`)."""


def draw(key: PRNGKeyArray, rows: int, length: int, widths: Mapping[str, int]) -> Draw:
    """Draws the words of a layer's inputs, whose numbers of channels are `widths`."""
    token_key, *channel_keys = jax.random.split(key, 1 + len(widths))
    channels = {
        name: jax.random.bits(one, (width,), jnp.uint32)
        for one, (name, width) in zip(channel_keys, widths.items(), strict=True)
    }
    return Draw(jax.random.bits(token_key, (rows, length), jnp.uint32), channels)


def kept(tokens: UInt32[Array, "*B"], channels: UInt32[Array, " I"], rate: float) -> Bool[Array, "*B I"]:
    """Returns which elements are kept, each with probability 1 - `rate` (right to 2^-32).

    The two words are random and equal for a whole row or column, so their exclusive or alone would leave a pattern:
    the four words at the corners of a rectangle cancel. Two rounds of multiplying and shifting remove it; the constants
    are those of Wellons' lowbias32 (https://github.com/skeeto/hash-prospector).
    """
    word = tokens[..., None] ^ channels
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word >= jnp.uint32(round(rate * 2**32))


def dropout(x: Float[Array, "*B I"], rate: float, drawn: Draw | None, name: str) -> Float[Array, "*B I"]:
    """Returns an adapter's input with a share `rate` of its elements zeroed and the rest scaled by 1 / (1 - rate).

    All adapters of one input share its mask, as all readers of a unit do in Srivastava et al. 2014 (PEFT draws one for
    each). Without words, or with rate 0, `x` comes back as it is.
    """
    if drawn is None or rate == 0:
        return x
    return _dropped(x, drawn.tokens, drawn.channels[name], rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dropped(x: Array, tokens: Array, channels: Array, rate: float) -> Array:
    return jnp.where(kept(tokens, channels, rate), x / (1 - rate), jnp.zeros_like(x))


# The backward pass mixes the words again: a mask that is kept for it would be as large as half the input.
_dropped.defvjp(
    lambda x, tokens, channels, rate: (_dropped(x, tokens, channels, rate), (tokens, channels)),
    lambda rate, words, dy: (_dropped(dy, *words, rate), None, None),
)
