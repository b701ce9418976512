"""Greedy decoding with a key-value cache, compiled once per bucket of prompt lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, UInt8

from mole_jax.data.tokenizer import Tokenizer
from mole_jax.model.llava import Llava
from mole_jax.parallel.sharding import batch_sharding
from mole_jax.parameters import Tree

BUCKET = 64
"""Prompts are padded to a multiple of this many positions, so that few lengths are compiled."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenised question: image positions are in `tokens`, `images` are 8-bit RGB squares in their order."""

    tokens: Int[np.ndarray, " T"]
    images: UInt8[np.ndarray, "N H W 3"]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Answers batches of prompts.

    `images_per_row` is the most images of a prompt; every batch has `batch_size` rows, empty ones added.
    """

    graph: nnx.GraphDef
    mesh: jax.sharding.Mesh
    batch_size: int
    images_per_row: int
    image_size: int
    max_new_tokens: int
    eos_id: int
    dtype: jnp.dtype

    def __call__(self, params: Tree, frozen: Tree, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Returns the new tokens of each prompt, up to and without the end-of-sequence token."""
        answers: list[list[int]] = []
        for start in range(0, len(prompts), self.batch_size):
            chunk = prompts[start : start + self.batch_size]
            arrays = jax.device_put(self._pad(chunk), batch_sharding(self.mesh))
            with jax.set_mesh(self.mesh):
                new = _decode(self.graph, params, frozen, arrays, self.max_new_tokens, self.eos_id, self.dtype)
            for row in np.asarray(new)[: len(chunk)]:
                end = np.flatnonzero(row == self.eos_id)
                answers.append(row[: end[0] if len(end) else len(row)].tolist())
        return answers

    def _pad(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        longest = max(len(prompt.tokens) for prompt in prompts)
        width = -(-longest // BUCKET) * BUCKET
        shape = (self.batch_size, self.images_per_row, self.image_size, self.image_size, 3)
        tokens, images = np.zeros((self.batch_size, width), np.int32), np.zeros(shape, np.uint8)
        # A row without a prompt has one token, so that there is a last position to continue from.
        lengths = np.ones(self.batch_size, np.int32)
        for row, prompt in enumerate(prompts):
            lengths[row] = len(prompt.tokens)
            tokens[row, : lengths[row]] = prompt.tokens
            images[row, : len(prompt.images)] = prompt.images
        return {"tokens": tokens, "lengths": lengths, "images": images}


def answer_text(tokenizer: Tokenizer, tokens: Sequence[int], stop: str | None) -> str:
    """Returns the text of an answer, up to the text that ends answers under this prompt, if there is one."""
    text = tokenizer.decode(tokens).strip()
    return text if stop is None else text.split(stop)[0].strip()


@partial(jax.jit, static_argnames=("graph", "max_new_tokens", "eos_id", "dtype"))
def _decode(
    graph: nnx.GraphDef,
    params: Tree,
    frozen: Tree,
    arrays: dict[str, Array],
    max_new_tokens: int,
    eos_id: int,
    dtype: jnp.dtype,
) -> Int[Array, "B N"]:
    """Returns `max_new_tokens` greedy tokens per row; after the end of a row it repeats `eos_id`."""
    model: Llava = nnx.merge(graph, params, frozen)
    tokens, lengths = arrays["tokens"], arrays["lengths"]
    rows, width = tokens.shape
    decoder = model.decoder
    cache = decoder.empty_cache(rows, width + max_new_tokens, dtype)
    hidden, cache = decoder.cached(model.embed(tokens, arrays["images"], dtype), cache, lengths)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first = jnp.argmax(decoder.logits(last), axis=-1).astype(jnp.int32)
    out = jnp.full((rows, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(first)

    def unfinished(carry) -> Array:
        position, token, _, _ = carry
        return (position < max_new_tokens) & (token != eos_id).any()

    def extend(carry):
        position, token, cache, out = carry
        hidden, cache = decoder.cached(decoder.embed(token[:, None], dtype), cache, jnp.ones_like(token))
        new = jnp.argmax(decoder.logits(hidden[:, 0]), axis=-1).astype(jnp.int32)
        new = jnp.where(token == eos_id, eos_id, new)
        return position + 1, new, cache, out.at[:, position].set(new)

    return jax.lax.while_loop(unfinished, extend, (1, first, cache, out))[3]
