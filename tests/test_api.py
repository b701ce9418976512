"""`mole_jax.load` and `mole_jax.generate` on the embedded base."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import mole_jax
from mole_jax.errors import UserError
from tests.tiny import ROOT


@pytest.fixture(scope="module")
def loaded():
    return mole_jax.load(str(ROOT / "assets" / "quickstart_base"))


def png(colour) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (80, 50), colour).save(stream, "PNG")
    return stream.getvalue()


def test_generate_answers_with_and_without_images_in_any_batch(loaded):
    model, processor = loaded
    prompts = ["<image>\nDescribe the picture.", "Repeat: left lung", "What is on the left?"]
    images = [[png((0, 0, 0))], [], [png((255, 255, 255))]]
    answers = mole_jax.generate(model, processor, prompts, images, max_new_tokens=6)
    assert all(isinstance(answer, str) for answer in answers)
    alone = [
        mole_jax.generate(model, processor, [prompt], [own], max_new_tokens=6)[0]
        for prompt, own in zip(prompts, images, strict=True)
    ]
    assert answers == alone


def test_processor_places_images_and_refuses_a_wrong_number(loaded):
    _, processor = loaded
    arch = processor.arch
    prompt = processor("What is shown?", [png((9, 9, 9))])
    assert (prompt.tokens == arch.image_token_id).sum() == arch.image_span
    assert prompt.images.shape == (1, 64, 64, 3)
    # Padded to a square with CLIP's mean colour (LLaVA-1.5), above and below a wide picture.
    np.testing.assert_array_equal(prompt.images[0, 0, 0], (122, 116, 104))
    with pytest.raises(UserError, match="has 2 <image>, 1 images were given"):
        processor("<image> and <image>?", [png((9, 9, 9))])


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        mole_jax.lode  # noqa: B018
