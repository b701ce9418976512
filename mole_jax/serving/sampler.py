"""Batches of prompts to answers: padded to a few shapes, decoded under jit, handed out whole or piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from mole_jax.config import DecodingConfig
from mole_jax.data.template import Template
from mole_jax.data.tiling.pictures import moved
from mole_jax.model.quantised import Quantised
from mole_jax.parallel.mesh import batch_shards
from mole_jax.parallel.sharding import batch_sharding, replicated
from mole_jax.parameters import AdapterParam, DecoderParam, Parameter, Tree, declared, unflatten
from mole_jax.prompts import PromptPreset
from mole_jax.serving.decode import programs
from mole_jax.serving.draw import Settings
from mole_jax.serving.text import Answer
from mole_jax.tokenizer import Tokenizer

CHUNK = 16
"""Tokens decoded between two looks for stop texts."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenised question: image positions are in `tokens`, `images` are tiles in their order.

    8-bit RGB images are normalised on the device; floating ones are taken as normalised.
    """

    tokens: Int[np.ndarray, " T"]
    images: UInt8[np.ndarray, "N H W 3"] | Float[np.ndarray, "N H W 3"]
    sources: Int[np.ndarray, "T K"] | None = None
    weights: Float[np.ndarray, "T K"] | None = None
    """Which features of its tiles each position takes, as in `mole_jax.data.batch.Batch`. None: one after the other."""
    number: int | None = None
    """Tells the prompt's random draws from others of the same seed. None: its place in the list."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Answers prompts, `batch_size` at a time (rounded up to what the mesh divides).

    Prompt lengths, rows, images and new tokens are padded to `bucket` sizes, and the settings of `decoding` are
    values of the compiled programs, so that other prompts and other settings seldom compile anything.
    """

    graph: nnx.GraphDef
    mesh: jax.sharding.Mesh
    batch_size: int
    eos_ids: tuple[int, ...]
    """Tokens that end an answer; rows that have ended are filled with the first."""
    dtype: jnp.dtype
    """Type of activations and of the cache."""
    decoding: DecodingConfig
    tokenizer: Tokenizer | None = None
    """None: tokens only; there are no stop texts."""
    tile_features: int = 0
    """Vectors that the model makes of one tile; for prompts with `sources`."""

    def __call__(self, params: Tree, frozen: Tree, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Returns the new tokens of each prompt without the token that ended it.

        An answer that a stop text ended may hold tokens after it; `answers` cuts them off.
        """
        return [answer.tokens for answer in self._all(params, frozen, prompts)]

    def answers(self, params: Tree, frozen: Tree, prompts: Sequence[Prompt]) -> list[str]:
        """Returns the text of each prompt's answer, without white space around it and cut before a stop text."""
        return [answer.text for answer in self._all(params, frozen, prompts)]

    def stream(
        self, params: Tree, frozen: Tree, prompts: Sequence[Prompt], *, every: int = 1
    ) -> Iterator[tuple[int, str]]:
        """Yields (place of the prompt, piece of its answer) while decoding, asking the device after `every` tokens.

        The pieces of a prompt join to what `answers` returns.
        """
        weights = self.weights(params, frozen)
        for start in range(0, len(prompts), self.batch_size):
            answers = [self._answer() for _ in prompts[start : start + self.batch_size]]
            for pieces in self._decode(weights, prompts, start, answers, every):
                yield from ((start + row, piece) for row, piece in enumerate(pieces) if piece)

    def weights(self, params: Tree, frozen: Tree) -> Tree:
        """Returns all arrays, decoder and adapters in the type of the activations, so that no step casts them again.

        Quantised kernels stay as they are.
        """

        def ready(parameter: Parameter) -> Any:
            value = parameter[...]
            cast = isinstance(parameter, AdapterParam | DecoderParam) and not isinstance(value, Quantised)
            return value.astype(self.dtype) if cast else value

        parameters = declared(nnx.merge(self.graph, params, frozen))
        return unflatten({path: ready(one) for path, one in parameters.items()})

    def _all(self, params: Tree, frozen: Tree, prompts: Sequence[Prompt]) -> list[Answer]:
        weights = self.weights(params, frozen)
        every = CHUNK if self.decoding.stop else self.decoding.max_new_tokens
        answers = [self._answer() for _ in prompts]
        for start in range(0, len(prompts), self.batch_size):
            for _ in self._decode(weights, prompts, start, answers[start : start + self.batch_size], every):
                pass
        return answers

    def _answer(self) -> Answer:
        return Answer(self.tokenizer, self.decoding.stop)

    def _decode(
        self, weights: Tree, prompts: Sequence[Prompt], start: int, answers: list[Answer], every: int
    ) -> Iterator[list[str]]:
        """Decodes the prompts from `start` on, one for each of `answers`, and yields the new text of each."""
        batch = prompts[start : start + len(answers)]
        numbers = [start + row if one.number is None else one.number for row, one in enumerate(batch)]
        arrays = pad(batch, batch_shards(self.mesh), self.tile_features)
        rows = len(arrays["lengths"])
        idle = rows - len(batch)
        # A row without a prompt ends with its first token.
        decoding = [self.decoding] * len(batch) + [DecodingConfig(max_new_tokens=1)] * idle
        place = batch_sharding(self.mesh)
        settings = jax.device_put(Settings.of(decoding, numbers + [0] * idle), place)
        limit, capacity = self.decoding.max_new_tokens, bucket(self.decoding.max_new_tokens)
        run = programs(self.mesh)
        common = {"graph": self.graph, "dtype": self.dtype, "eos_ids": self.eos_ids, "weights": weights}
        # The mesh is not in force while the caller has the pieces.
        with jax.set_mesh(self.mesh):
            state = run.prefill(**common, capacity=capacity, prompts=jax.device_put(arrays, place), settings=settings)
        made = 0
        while True:
            tokens, done, count = jax.device_get((state.tokens, state.done, state.count))
            ended = done | (count >= limit)
            yield [
                answer.push(self._until_end(row[made:count]), last=bool(end))
                for answer, row, end in zip(answers, tokens, ended, strict=False)
            ]
            made = int(count)
            if all(answer.finished for answer in answers):
                return
            finished = np.asarray([answer.finished for answer in answers] + [True] * idle)
            state = state._replace(done=jax.device_put(finished, replicated(self.mesh)))
            with jax.set_mesh(self.mesh):
                state = run.extend(**common, state=state, settings=settings, until=np.int32(min(made + every, limit)))

    def _until_end(self, tokens: np.ndarray) -> list[int]:
        end = np.flatnonzero(np.isin(tokens, self.eos_ids))
        return tokens[: end[0] if len(end) else len(tokens)].tolist()


def ending(decoding: DecodingConfig, prompt: PromptPreset | Template) -> DecodingConfig:
    """Returns `decoding` with the text that ends answers under this preset, if there is one, as a further stop text."""
    own = (prompt.stop_text,) if isinstance(prompt, PromptPreset) and prompt.stop_text is not None else ()
    return dataclasses.replace(decoding, stop=decoding.stop + own)


def bucket(size: int) -> int:
    """Returns the smallest of 16, 24, 32, 48, 64, 96, … that is at least `size`: 17 of them reach 4,096."""
    power = 16
    while power < size:
        power *= 2
    return power * 3 // 4 if power > 16 and size <= power * 3 // 4 else power


def pad(
    prompts: Sequence[Prompt], shards: int, tile_features: int = 0, width: int | None = None
) -> dict[str, np.ndarray]:
    """Returns prompts as arrays of bucketed shapes, whose rows and images divide over `shards`.

    Args:
        prompts: at least one.
        shards: parts of a batch.
        tile_features: vectors that the model makes of one tile; for prompts with `sources`.
        width: T below. None: the `bucket` of the longest prompt.

    Returns:
        tokens (B, T), lengths (B,) and images (N, H, W, 3): those of all prompts, one after the other. B and N are
        `shards` times a power of two, N may be 0. If prompts have them, also sources and weights (B, T, K) among the
        features of all N, `tile_features` of each.
    """
    width = width or bucket(max(len(prompt.tokens) for prompt in prompts))
    rows = _power_of_two(len(prompts), shards)
    tokens = np.zeros((rows, width), np.int32)
    # A row without a prompt has one token, so that there is a last position to continue from.
    lengths = np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        lengths[row] = len(prompt.tokens)
        tokens[row, : lengths[row]] = prompt.tokens
    given = np.concatenate([prompt.images for prompt in prompts])
    images = np.zeros((_power_of_two(len(given), shards), *given.shape[1:]), given.dtype)
    images[: len(given)] = given
    return {"tokens": tokens, "lengths": lengths, "images": images, **_places(prompts, tokens.shape, tile_features)}


def _places(prompts: Sequence[Prompt], shape: tuple[int, ...], tile_features: int) -> dict[str, np.ndarray]:
    """Returns the places of all prompts among all images; nothing where images go in order."""
    taps = next((one.sources.shape[-1] for one in prompts if one.sources is not None), None)
    if taps is None:
        return {}
    sources, weights, before = np.zeros((*shape, taps), np.int32), np.zeros((*shape, taps), np.float32), 0
    for row, one in enumerate(prompts):
        assert one.sources is not None, "all prompts of a model have places, or none has"
        assert one.weights is not None, "places come with their shares"
        sources[row, : len(one.tokens)] = moved(one.sources, one.weights, before * tile_features)
        weights[row, : len(one.tokens)] = one.weights
        before += len(one.images)
    return {"sources": sources, "weights": weights}


def _power_of_two(count: int, shards: int) -> int:
    """Returns the smallest shards * 2**k that is at least `count`; 0 for 0."""
    return shards << (-(-count // shards) - 1).bit_length() if count else 0
