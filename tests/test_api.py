"""`mole_jax.load` and `mole_jax.generate` on the embedded base."""

from __future__ import annotations

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mole_jax
from mole_jax.config import DecodingConfig, MeshConfig
from mole_jax.data.conversation import Turn
from mole_jax.errors import UserError
from tests.tiny import ROOT

BASE = str(ROOT / "assets" / "quickstart_base")
SHORT = DecodingConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def loaded():
    return mole_jax.load(BASE)


def png(colour) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (80, 50), colour).save(stream, "PNG")
    return stream.getvalue()


def test_generate_answers_with_and_without_images_in_any_batch(loaded):
    model, processor = loaded
    prompts = ["<image>\nDescribe the picture.", "Repeat: left lung", "What is on the left?"]
    images = [[png((0, 0, 0))], [], [png((255, 255, 255))]]
    answers = mole_jax.generate(model, processor, prompts, images, decoding=SHORT)
    assert all(isinstance(answer, str) for answer in answers)
    alone = [
        mole_jax.generate(model, processor, [prompt], [own], decoding=SHORT)[0]
        for prompt, own in zip(prompts, images, strict=True)
    ]
    assert answers == alone


def test_settings_of_decoding_arrive(loaded):
    model, processor = loaded
    whole = mole_jax.generate(model, processor, ["Repeat: left lung"], decoding=SHORT)[0]
    stop = whole.split()[1]
    cut = DecodingConfig(max_new_tokens=6, stop=(stop,))
    assert mole_jax.generate(model, processor, ["Repeat: left lung"], decoding=cut) == [whole.split(stop)[0].strip()]
    with pytest.raises(UserError, match=r"decoding\.top_p is 1\.5, it must be over 0 and at most 1"):
        mole_jax.generate(model, processor, ["Repeat: left lung"], decoding=DecodingConfig(top_p=1.5))
    with pytest.raises(UserError, match="the answer may have 500, the model has room for 512 together; shorten"):
        mole_jax.generate(model, processor, ["Repeat: left lung"], decoding=DecodingConfig(max_new_tokens=500))


def test_load_places_the_weights_and_takes_its_settings():
    model, processor = mole_jax.load(
        BASE, mesh=MeshConfig(data=2, fsdp=2), dtype="bfloat16", prompt="llava_mole", image_aspect="crop"
    )
    kernel = model.decoder.layers.mlp.up_proj.kernel[...]
    assert len(kernel.sharding.device_set) == 4
    assert kernel.dtype == jnp.bfloat16
    assert (processor.prompt, processor.image_aspect) == ("llava_mole", "crop")


def test_processor_places_images_and_refuses_a_wrong_number(loaded, tmp_path):
    _, processor = loaded
    arch = processor.arch
    prompt = processor("What is shown?", [png((9, 9, 9))])
    assert (prompt.tokens == arch.image_token_id).sum() == arch.image_span
    assert prompt.images.shape == (1, 64, 64, 3)
    # Padded to a square with CLIP's mean colour (LLaVA-1.5), above and below a wide picture.
    np.testing.assert_array_equal(prompt.images[0, 0, 0], (122, 116, 104))
    with pytest.raises(UserError, match="has 2 <image>, 1 images were given"):
        processor("<image> and <image>?", [png((9, 9, 9))])
    (tmp_path / "grey.png").write_bytes(png((9, 9, 9)))
    named = processor("What is shown?", [str(tmp_path / "grey.png")])
    np.testing.assert_array_equal(named.images, prompt.images)
    with pytest.raises(UserError, match=r"image 'none\.png' does not exist"):
        processor("What is shown?", [str(tmp_path / "none.png")])
    with pytest.raises(UserError, match="leaves its folder"):
        processor("What is shown?", ["../grey.png"], root=tmp_path)


def test_a_conversation_is_a_prompt_too(loaded):
    """The image stands before the first turn, and every answer ends as it did in training."""
    _, processor = loaded
    turns = [Turn("user", "What is shown?"), Turn("assistant", "A box."), Turn("user", "What colour?")]
    prompt = processor(turns, [png((9, 9, 9))])
    alone = processor("What is shown?", [png((9, 9, 9))]).tokens
    np.testing.assert_array_equal(prompt.tokens[: len(alone)], alone)
    words = processor.tokenizer
    assert (prompt.tokens == words.eos_id).sum() == 1
    assert words.decode(prompt.tokens).replace(" ", "").endswith("ASSISTANT:Abox.USER:Whatcolour?ASSISTANT:")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        mole_jax.lode  # noqa: B018
