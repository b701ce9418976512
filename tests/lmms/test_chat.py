"""lmms-eval's messages and settings in this project's words; lmms-eval itself is not needed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mole_jax.config import DecodingConfig
from mole_jax.data.conversation import Turn
from mole_jax.errors import UserError
from mole_jax.lmms.chat import conversation, decoding


def said(role, *parts):
    return {"role": role, "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


def test_parts_become_turns_and_images():
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    turns, images = conversation(
        [
            said("system", text("Be brief.")),
            said("user", {"type": "image", "url": picture}, text("What is it?")),
            said("assistant", text("A gradient.")),
            said("user", text("And this: "), {"type": "image", "url": "b.png"}, text("or <image>that?")),
        ]
    )
    assert turns == [
        Turn("system", "Be brief."),
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "A gradient."),
        Turn("user", "And this: <image>\nor that?"),
    ]
    assert images[1] == "b.png"
    # Not one pixel changes on the way.
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(images[0]))), np.asarray(picture))


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (said("tool", text("Be brief.")), "a message of role tool"),
        (said("user", {"type": "video", "url": "a.mp4"}), "a part of type video"),
    ],
)
def test_what_the_model_cannot_be_told_is_refused(message, problem):
    with pytest.raises(UserError, match=problem):
        conversation([message])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, DecodingConfig(max_new_tokens=1024)),
        # As lmms-eval's tasks write them; a temperature is not used unless sampling is on.
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
            DecodingConfig(max_new_tokens=16),
        ),
        ({"temperature": 0.7, "do_sample": False}, DecodingConfig(max_new_tokens=1024)),
        ({"temperature": 0.7, "top_p": None, "top_k": 5}, DecodingConfig(1024, temperature=0.7, top_k=5)),
        ({"until": ["\n\n", "USER:"]}, DecodingConfig(1024, stop=("\n\n", "USER:"))),
        ({"until": "\n", "image_aspect_ratio": "original"}, DecodingConfig(1024, stop=("\n",))),
    ],
)
def test_settings(settings, expected):
    assert decoding(settings) == expected


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_beams": 5}, "num_beams 5; there is no beam search here"),
        ({"max_tokens": 5}, "unknown generation setting 'max_tokens', did you mean 'max_new_tokens'"),
        ({"top_p": 0.0}, "lmms-eval: generation_kwargs.top_p is 0.0, it must be over 0"),
    ],
)
def test_settings_without_a_counterpart_are_refused(settings, problem):
    with pytest.raises(UserError, match=problem):
        decoding(settings)
