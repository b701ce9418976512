"""The same in Python: ``mole_jax.load`` and ``mole_jax.generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from flax import nnx

from mole_jax.config import Config, DataConfig, DecodingConfig, Dtype, ImageAspect, MeshConfig, ModelConfig, PromptName
from mole_jax.config_check import check_decoding, check_mesh
from mole_jax.data.load import settled
from mole_jax.errors import UserError, nearest
from mole_jax.model.llava import Llava
from mole_jax.parameters import unflatten
from mole_jax.serving.assistant import Assistant, Processor
from mole_jax.serving.inputs import Picture, questions
from mole_jax.weights.open import open_model, open_source


def load(
    path: str,
    *,
    base: str | None = None,
    alpha: float | None = None,
    tokenizer: str | None = None,
    dtype: Dtype = "float32",
    prompt: PromptName | None = None,
    image_aspect: ImageAspect | None = None,
    mesh: MeshConfig | None = None,
) -> tuple[Llava, Processor]:
    """Loads weights of any format that `mole_jax.weights.open.open_source` knows.

    Args:
        path: a run's folder, a HF or original LLaVA folder, a hub name, an adapter folder or a LLaVA-MoLE file.
        base: what adapters stand on. None: what they name themselves.
        alpha: the scale's numerator, for a released LLaVA-MoLE file. None: as the file says, else twice its rank.
        tokenizer: folder with tokenizer.model or tokenizer.json. None: the one beside the weights.
        dtype: type of the frozen weights, and of the activations of `generate`.
        prompt: prompt preset, or checkpoint for the chat template beside the tokenizer. None: what the weights were
            trained with; if they say nothing, v1 for LLaVA-1.5 and checkpoint for any other with a template.
        image_aspect: how images become square. None: as trained, or as the base does if the weights say nothing.
        mesh: how devices share the work. None: one device.

    Returns:
        The model, whose ``model(tokens, images, positions, segment_ids)`` gives logits, and its processor.

    Raises:
        UserError: a setting makes no sense, the weights or the tokenizer cannot be read, or the mesh does not divide
            them.
    """
    mesh = check_mesh(mesh or MeshConfig(data=1))
    for name, value, kind in (
        ("dtype", dtype, Dtype),
        ("prompt", prompt, PromptName),
        ("image_aspect", image_aspect, ImageAspect),
    ):
        if value is not None and value not in get_args(kind):
            raise UserError(
                f"{name} is {value!r}{nearest(str(value), get_args(kind))}; it is one of {', '.join(get_args(kind))}"
            )
    source = open_source(path, base=base, alpha=alpha)
    if tokenizer is None and source.tokenizer is None:
        raise UserError(f"{path}: has no tokenizer.model or tokenizer.json; name a folder that has one as tokenizer")
    settings = Config(model=ModelConfig(tokenizer=tokenizer, frozen_dtype=dtype, compute_dtype=dtype), mesh=mesh)
    found = open_model(settings, source)
    own = DataConfig(prompt=prompt or source.prompt, image_aspect=image_aspect or source.image_aspect)
    own = settled(own, found.tokenizer, source.architecture.image)
    assert own.prompt is not None
    processor = Processor(found.tokenizer, source.architecture, own.prompt, own.image_aspect)
    return nnx.merge(found.spec.graph, unflatten(found.place())), processor


def generate(
    model: Llava,
    processor: Processor,
    prompts: str | Sequence[str],
    images: Picture | Sequence[Picture | Sequence[Picture] | None] | None = None,
    *,
    decoding: DecodingConfig | None = None,
    batch_size: int = 8,
) -> list[str]:
    """Answers one question or several, about images or none.

    Args:
        model, processor: what `load` returned.
        prompts: a question or a list of them, with an ``<image>`` where an image belongs, or without to have the images
            stand before.
        images: for one question its image, or a list of them. For a list of questions a list with an entry for each:
            an image, a list of them, or None. An image is a path, a file's content (bytes), a PIL image, or a numpy
            array of shape (H, W, 3) of uint8, RGB. None: there are none.
        decoding: how to decode. None: greedily, at most 128 tokens.
        batch_size: questions decoded at a time.

    Returns:
        The answers, one for each question; a list also for one.

    Raises:
        UserError: an argument is of another type or shape, a setting makes no sense, a question is too long or has
            another number of images than placeholders, or an image cannot be read.
    """
    decoding = check_decoding(decoding or DecodingConfig(max_new_tokens=128), "decoding")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, it must be at least 1")
    asked = questions(prompts, images)
    assistant = Assistant.of(model, processor, decoding, batch_size)
    return assistant.answers([assistant.prompt(question, own) for question, own in asked])
