"""The same in Python: ``mole_jax.load`` and ``mole_jax.generate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mole_jax.config import ImageAspect, MeshConfig, ModelConfig, PromptName
from mole_jax.data.conversation import PROMPTS, Turn, encode_prompt
from mole_jax.data.image import load_image
from mole_jax.data.tokenizer import Tokenizer
from mole_jax.errors import UserError
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.llava import Llava
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import unflatten
from mole_jax.serving.sampler import Prompt, Sampler, answer_text
from mole_jax.training.setup import check_vocabulary
from mole_jax.training.state import ModelSpec, place
from mole_jax.weights.source import open_source, tokenizer_path

MAX_PIXELS = 50_000_000
"""Images with more pixels are refused as decompression bombs."""


@dataclasses.dataclass(frozen=True)
class Processor:
    """What stands between a person's words and pictures and a model's arrays."""

    tokenizer: Tokenizer
    arch: LlavaArchitecture
    prompt: PromptName
    image_aspect: ImageAspect

    def __call__(self, question: str, images: Sequence[str | bytes] = ()) -> Prompt:
        """Returns the prompt of one question; `images` are paths or file contents, one per ``<image>``.

        Without an ``<image>`` in the question the images stand before it.

        Raises:
            UserError: the numbers of images and placeholders differ, or an image cannot be read.
        """
        if images and "<image>" not in question:
            question = "<image>\n" * len(images) + question
        tokens = encode_prompt(
            [Turn("user", question)],
            self.tokenizer,
            PROMPTS[self.prompt],
            image_span=self.arch.image_span,
            image_token_id=self.arch.image_token_id,
        )
        found = int((tokens == self.arch.image_token_id).sum()) // self.arch.image_span
        if found != len(images):
            raise UserError(f"the question has {found} <image>, {len(images)} images were given; make them equal")
        side = self.arch.vision.image_size
        pixels = [
            load_image(image, None, size=side, aspect=self.image_aspect, max_pixels=MAX_PIXELS) for image in images
        ]
        return Prompt(tokens, np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8))


def load(path: str, *, tokenizer: str | None = None, dtype: str = "float32") -> tuple[Llava, Processor]:
    """Loads a run's folder, a HF LLaVA folder or a hub name.

    Args:
        path: where the weights are; a run brings its base along by name.
        tokenizer: folder with tokenizer.model or tokenizer.json. None: the one beside the weights.
        dtype: type of the frozen weights.

    Returns:
        The model, whose ``model(tokens, images, positions, segment_ids)`` gives logits, and its processor with
        the prompt preset and image preparation that the weights were trained with (LLaVA-1.5's if they say none).

    Raises:
        UserError: the weights or the tokenizer cannot be read.
    """
    source = open_source(path)
    arch = source.architecture
    words = Tokenizer.load(tokenizer_path(ModelConfig(base=path, tokenizer=tokenizer), source))
    check_vocabulary(words, arch.decoder.vocab)
    spec = ModelSpec.of(arch, source.adapter)
    leaves = place(spec, source, make_mesh(MeshConfig(data=1)), source.trained, dtype, source.seed)
    processor = Processor(words, arch, source.prompt or "v1", source.image_aspect or "pad")
    return nnx.merge(spec.graph, unflatten(leaves)), processor


def generate(
    model: Llava,
    processor: Processor,
    prompts: Sequence[str],
    images: Sequence[Sequence[str | bytes]] | None = None,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> list[str]:
    """Answers questions greedily; ``images[i]`` belong to ``prompts[i]``.

    Raises:
        UserError: as `Processor`.
    """
    given = [()] * len(prompts) if images is None else images
    asked = [processor(question, own) for question, own in zip(prompts, given, strict=True)]
    graph, state = nnx.split(model)
    sampler = Sampler(
        graph,
        make_mesh(MeshConfig(data=1)),
        batch_size=min(batch_size, max(1, len(asked))),
        images_per_row=max((len(one.images) for one in asked), default=0) or 1,
        image_size=processor.arch.vision.image_size,
        max_new_tokens=max_new_tokens,
        eos_id=processor.tokenizer.eos_id,
        dtype=jnp.dtype("float32"),
    )
    answers = sampler(nnx.to_pure_dict(state), {}, asked)
    stop = PROMPTS[processor.prompt].stop_text
    return [answer_text(processor.tokenizer, answer, stop) for answer in answers]
