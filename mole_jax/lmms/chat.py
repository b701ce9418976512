"""What lmms-eval asks, in this project's words: its chat messages as turns and images, its settings as decoding.

Apart from `mole_jax.lmms.model`, so that it is there, and tested, without lmms-eval.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from PIL import Image

from mole_jax.config import DecodingConfig
from mole_jax.config_check import check_decoding
from mole_jax.data.conversation import Role, Turn
from mole_jax.errors import UserError, nearest
from mole_jax.prompts import IMAGE

DEFAULT_NEW_TOKENS = 1024
"""Longest answer where a task does not say, as in lmms-eval's own models."""

_SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
_OTHERS = ("do_sample", "num_beams", "until", "image_aspect_ratio")


def conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Turn], list[str | bytes]]:
    """Returns the turns, with an ``<image>`` where a part is one, and the images in their order.

    Args:
        messages: ``{"role": "system", "user" or "assistant", "content": [{"type": "text", "text": …} or {"type":
            "image", "url": a PIL image or a path}]}``. An ``<image>`` in a text goes: the image itself is a part.

    Raises:
        UserError: a message of another role, or a part that is not text or image.
    """
    turns: list[Turn] = []
    images: list[str | bytes] = []
    for message in messages:
        role, words = message["role"], ""
        if role not in get_args(Role):
            raise UserError(f"lmms-eval: a message of role {role}, which prompts have no place for")
        for part in message["content"]:
            if part["type"] == "text":
                words += part["text"].replace(IMAGE, "")
            elif part["type"] == "image":
                words += f"{IMAGE}\n"
                images.append(_file(part["url"]))
            else:
                raise UserError(f"lmms-eval: a part of type {part['type']}, the model takes text and images")
        turns.append(Turn(role, words))
    return turns, images


def decoding(settings: Mapping[str, Any]) -> DecodingConfig:
    """Returns the decoding that a task's generation_kwargs ask for; greedy and at most 1,024 tokens if they don't say.

    `image_aspect_ratio` is left alone: how images become square is the checkpoint's own matter.

    Raises:
        UserError: a setting that has no counterpart here, such as more than one beam.
    """
    for name in settings:
        if name not in (*_SETTINGS, *_OTHERS):
            raise UserError(f"lmms-eval: unknown generation setting '{name}'{nearest(name, [*_SETTINGS, *_OTHERS])}")
    if settings.get("num_beams") not in (None, 1):
        raise UserError(f"lmms-eval: num_beams {settings['num_beams']}; there is no beam search here, set it to 1")
    chosen = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    if settings.get("do_sample") is False:
        chosen["temperature"] = 0.0
    until = settings.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    return check_decoding(
        DecodingConfig(**{"max_new_tokens": DEFAULT_NEW_TOKENS} | chosen, stop=stop), "lmms-eval: generation_kwargs"
    )


def _file(image: Image.Image | str) -> str | bytes:
    if isinstance(image, str):
        return image
    content = io.BytesIO()
    image.convert("RGB").save(content, format="PNG")
    return content.getvalue()
