"""A model that answers people: from words and pictures to prompts, and from prompts to text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mole_jax.config import DataConfig, DecodingConfig, ImageAspect, PromptName
from mole_jax.data.conversation import Turn, encode_prompt
from mole_jax.data.image import image_size, load_tiles
from mole_jax.data.load import Layout
from mole_jax.data.template import answer_ends
from mole_jax.data.tiling.pictures import places, row_taps
from mole_jax.data.urls import is_url
from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.llava import Llava
from mole_jax.parameters import Tree
from mole_jax.prompts import IMAGE
from mole_jax.serving.inputs import Picture, content, pictures
from mole_jax.serving.sampler import Prompt, Sampler, ending
from mole_jax.tokenizer import Tokenizer

MAX_PIXELS = 50_000_000
"""Images with more pixels are refused as decompression bombs."""


@dataclasses.dataclass(frozen=True)
class Processor:
    """What stands between a person's words and pictures and a model's arrays."""

    tokenizer: Tokenizer
    arch: LlavaArchitecture
    prompt: PromptName
    image_aspect: ImageAspect | None
    """None: of models that cut images into tiles."""

    @functools.cached_property
    def layout(self) -> Layout:
        """How a question and its images become tokens and tiles."""
        data = DataConfig(prompt=self.prompt, image_aspect=self.image_aspect, max_image_pixels=MAX_PIXELS)
        return Layout.of(data, self.arch.image, self.tokenizer)

    def __call__(
        self,
        question: str | Sequence[Turn],
        images: Picture | Sequence[Picture] | None = None,
        root: str | Path | None = None,
    ) -> Prompt:
        """Returns the prompt after which the model answers.

        Args:
            question: one question, or the turns of a conversation of which the last is the user's.
            images: a picture or a list of them, one per ``<image>``. Without an ``<image>`` in the words they stand
                before the first turn.
            root: folder that paths are relative to and must stay inside. None: any path will do.

        Raises:
            UserError: the numbers of images and placeholders differ, or an image cannot be read.
        """
        images = pictures(images, "images")
        turns = [Turn("user", question)] if isinstance(question, str) else list(question)
        if images and not any(IMAGE in turn.text for turn in turns):
            first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
            turns[first] = Turn("user", f"{IMAGE}\n" * len(images) + turns[first].text)
        image, found = self.layout.image, [_located(one, root, self.layout.image) for one in images]
        rest: dict[str, Any] = {"pictures": len(images), "max_pixels": MAX_PIXELS}
        sizes = [image_size(*one, image, **rest) for one in found]
        layouts = self.layout.layouts(sizes)
        tokens = encode_prompt(turns, self.tokenizer, self.layout.prompt, image, layouts)
        tiles = [load_tiles(*one, image, **rest) for one in found]
        joined = np.concatenate(tiles) if tiles else np.zeros((0, image.size, image.size, 3), np.uint8)
        if row_taps(image) is None:
            return Prompt(tokens, joined)
        return Prompt(tokens, joined, *places(image, tokens == image.token_id, layouts))


def _located(picture: Picture, root: str | Path | None, spec: ImageSpec) -> tuple[str | bytes, str | Path | None]:
    """Returns an image's content or path, and the folder that this is relative to."""
    image = content(picture, spec)
    if root is None and isinstance(image, str) and not is_url(image):
        file = Path(image).expanduser().resolve()
        return file.name, file.parent
    return image, root


@dataclasses.dataclass(frozen=True)
class Assistant:
    """A loaded model with its processor and one way of decoding."""

    processor: Processor
    params: Tree
    sampler: Sampler

    @classmethod
    def of(cls, model: Llava, processor: Processor, decoding: DecodingConfig, batch_size: int) -> Assistant:
        """Wraps what `mole_jax.load` returns; activations are of the type of the model's embedding."""
        graph, state = nnx.split(model)
        embedding = model.decoder.embedding[...]
        sampler = Sampler(
            graph,
            cast(Mesh, cast(NamedSharding, embedding.sharding).mesh),
            batch_size=batch_size,
            eos_ids=answer_ends(processor.layout.prompt, processor.tokenizer, processor.arch.decoder.eos_ids),
            dtype=embedding.dtype,
            decoding=ending(decoding, processor.layout.prompt),
            tokenizer=processor.tokenizer,
            tile_features=processor.arch.image.tile_features,
        )
        return cls(processor, nnx.to_pure_dict(state), sampler)

    def prompt(
        self,
        question: str | Sequence[Turn],
        images: Picture | Sequence[Picture] | None = None,
        root: str | Path | None = None,
    ) -> Prompt:
        """As `Processor`; raises `UserError` also if prompt and answer may not fit into the model's positions."""
        prompt = self.processor(question, images, root)
        most, room = self.sampler.decoding.max_new_tokens, self.processor.arch.decoder.max_position
        if len(prompt.tokens) + most > room:
            raise UserError(
                f"the prompt has {len(prompt.tokens)} tokens and the answer may have {most}, the model has room for "
                f"{room} together; shorten the question or lower max_new_tokens"
            )
        return prompt

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Returns the text of each answer."""
        return self.sampler.answers(self.params, {}, prompts)

    def stream(self, prompt: Prompt) -> Iterator[str]:
        """Yields the answer piece by piece, as it comes."""
        return (piece for _, piece in self.sampler.stream(self.params, {}, [prompt]))
