"""Questions and pictures as people give them in Python: one or many, as paths, files, PIL images or arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mole_jax.data.colour import to_rgb, turn_of
from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec
from mole_jax.terminal import shortened

type Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A path or `data:` URL, an image file's content, a PIL image, or an array of shape (H, W, 3), uint8, RGB."""

_PICTURES = (str, os.PathLike, bytes, Image.Image, np.ndarray)
_WANTED = "a path, bytes of an image file, a PIL image or a numpy array (H, W, 3) of uint8"


def questions(
    prompts: str | Sequence[str], images: Picture | Sequence[Picture | Sequence[Picture] | None] | None
) -> list[tuple[str, list[Picture]]]:
    """Returns each question with its pictures.

    Args:
        prompts: one question, or several.
        images: for one question its picture, or a list of them; for several a list with an entry for each: a picture,
            a list of them, or None. None: there are none.

    Raises:
        UserError: something is of another type, or the numbers differ.
    """
    if isinstance(prompts, str):
        return [(prompts, pictures(images, "images"))]
    if not isinstance(prompts, list | tuple):
        raise UserError(f"prompts is {_kind(prompts)}, expected a string or a list of strings")
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompts[{place}] is {_kind(prompt)}, expected a string")
    if images is None:
        return [(prompt, []) for prompt in prompts]
    if not isinstance(images, list | tuple):
        raise UserError(
            f"images is {_kind(images)}, but prompts is a list; give a list with an entry for each of {len(prompts)}"
        )
    if len(images) != len(prompts):
        raise UserError(
            f"images has {len(images)} entries for {len(prompts)} prompts; give one for each, None where there is none"
        )
    return [
        (prompt, pictures(own, f"images[{place}]"))
        for place, (prompt, own) in enumerate(zip(prompts, images, strict=True))
    ]


def pictures(given: Any, name: str) -> list[Picture]:
    """Returns the pictures of one question, given as one, a list of them, or None.

    Raises:
        UserError: one is of another type or shape, `name` and its place say which.
    """
    if given is None:
        return []
    if isinstance(given, _PICTURES):
        return [_checked(given, name)]
    if not isinstance(given, list | tuple):
        raise UserError(f"{name} is {_kind(given)}, expected {_WANTED}, or a list of such")
    return [_checked(one, f"{name}[{place}]") for place, one in enumerate(given)]


def content(picture: Picture, spec: ImageSpec) -> str | bytes:
    """Returns a path or a file's content, so that a picture in memory goes the same way as one on disk.

    A PIL image that was opened from a file is turned as `spec` says, and put on white.

    Raises:
        UserError: a PIL image cannot be decoded, or is of a mode of which no one knows what is white.
    """
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        return os.fspath(picture) if isinstance(picture, os.PathLike) else picture
    stream = io.BytesIO()
    try:
        turn = turn_of(picture) if spec.exif == "apply" else None
        rgb = to_rgb(picture, spec.transparency)
        rgb = rgb if turn is None else rgb.transpose(turn)
        rgb.save(stream, "PPM")  # the pixels and nothing else
    except MemoryError:
        raise
    except Exception as error:  # a file that Pillow opened is decoded here, and may be broken
        size = f"{picture.mode}, {picture.width} x {picture.height}"
        raise UserError(f"a PIL image ({size}) cannot be used: {' '.join(str(error).split())}") from None
    return stream.getvalue()


def _checked(picture: Picture, name: str) -> Picture:
    if not isinstance(picture, _PICTURES):
        raise UserError(f"{name} is {_kind(picture)}, expected {_WANTED}")
    if isinstance(picture, np.ndarray):
        fits = picture.ndim == 3 and picture.shape[-1] == 3 and picture.size and picture.dtype == np.uint8
        if not fits:
            raise UserError(
                f"{name} is an array of shape {picture.shape} and type {picture.dtype}, expected (H, W, 3) of uint8"
            )
    return picture


def _kind(value: object) -> str:
    return f"{type(value).__name__} {shortened(repr(value), 40)}"
