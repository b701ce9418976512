"""What the tilings share: squares of pixels, and the places of a tile's features."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec

Size = tuple[int, int]
"""Width and height in pixels, as PIL has them."""


def resized(rgb: Image.Image, size: Size, spec: ImageSpec) -> Image.Image:
    """Returns `rgb` in another size, by the filter of `spec`."""
    return rgb.resize(size, Image.Resampling[spec.resample.upper()])


def squared(rgb: Image.Image, spec: ImageSpec, fit: Literal["pad", "crop", "stretch"]) -> Image.Image:
    """Returns `rgb` as one square tile.

    `pad` fills up to a square with the mean colour and resizes; `crop` resizes the shortest side and cuts out the
    centre; `stretch` gives up the aspect ratio.
    """
    if fit == "pad":
        rgb = _padded(rgb, spec)
    if fit == "crop":
        return _cropped(rgb, spec)
    return resized(rgb, (spec.size, spec.size), spec)


def divided(canvas: Image.Image, side: int) -> list[Image.Image]:
    """Returns the tiles of a canvas whose sides are multiples of `side`, row after row."""
    width, height = canvas.size
    corners = [(left, top) for top in range(0, height, side) for left in range(0, width, side)]
    return [canvas.crop((left, top, left + side, top + side)) for left, top in corners]


def stacked(tiles: list[Image.Image]) -> UInt8[np.ndarray, "N H W 3"]:
    """Returns tiles of one size as an array."""
    return np.stack([np.asarray(tile, np.uint8) for tile in tiles])


def grid_features(spec: ImageSpec, rows: int, columns: int, first: int) -> Int[np.ndarray, "h w"]:
    """Returns which of a picture's features lies where, for a grid of tiles the first of which is tile `first`.

    h is `rows` times `spec.side`, w likewise; features of a tile outside its grid are left out.
    """
    y, x = np.indices((rows * spec.side, columns * spec.side))
    tile = first + y // spec.side * columns + x // spec.side
    return tile * spec.tile_features + spec.vectors + spec.first + y % spec.side * spec.side + x % spec.side


def too_thin(size: Size) -> UserError:
    """Returns what to raise for a picture that no tiles fit to."""
    return UserError(f"{size[0]} x {size[1]} pixels are too long and thin to be cut into tiles; cut it or take it out")


def _padded(rgb: Image.Image, spec: ImageSpec) -> Image.Image:
    width, height = rgb.size
    if width == height:
        return rgb
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in spec.mean))
    square.paste(rgb, ((side - width) // 2, (side - height) // 2))
    return square


def _cropped(rgb: Image.Image, spec: ImageSpec) -> Image.Image:
    short, size = min(rgb.size), spec.size
    width, height = (int(size * side / short) for side in rgb.size)
    left, top = (width - size) // 2, (height - size) // 2
    return resized(rgb, (width, height), spec).crop((left, top, left + size, top + size))
