"""Rows and columns of tiles with marks between, then a global view, as in SmolVLM and Idefics3."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mole_jax.data.tiling.squares import Size, divided, resized, stacked
from mole_jax.image_spec import ImageSpec, PictureLayout, Split

LONGEST = 4096
"""No side is made longer than this, in pixels, whatever `Split.longest` says."""


def layout(spec: ImageSpec, tiling: Split, size: Size, image_text: str) -> PictureLayout:
    """Returns each tile's features behind its mark, a line of text for each row of tiles, then the global view's."""
    rows, columns = _tiles(spec, tiling, size)
    tiles = rows * columns + 1
    text = "".join(
        "".join(f"{tiling.before}<row_{row}_col_{column}>{image_text}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    )
    text += ("\n" if rows else "") + tiling.before + tiling.whole + image_text + tiling.before
    source = np.arange(tiles * spec.tile_features, dtype=np.int32)[:, None]
    return PictureLayout(tiles, text, (spec.tile_features,) * tiles, source)


def cut(rgb: Image.Image, spec: ImageSpec, tiling: Split) -> UInt8[np.ndarray, "N H W 3"]:
    """Returns the tiles, row after row, and the global view."""
    rgb = resized(rgb, _scaled(rgb.size, tiling.longest), spec)
    if not tiling.split:
        return stacked([resized(rgb, (spec.size, spec.size), spec)])
    rgb = resized(rgb, _canvas(rgb.size, spec.size), spec)
    if rgb.size == (spec.size, spec.size):
        return stacked([rgb])
    return stacked([*divided(rgb, spec.size), resized(rgb, (spec.size, spec.size), spec)])


def _tiles(spec: ImageSpec, tiling: Split, size: Size) -> tuple[int, int]:
    """Returns rows and columns; none where the global view is all."""
    width, height = _canvas(_scaled(size, tiling.longest), spec.size)
    if not tiling.split or (width, height) == (spec.size, spec.size):
        return 0, 0
    return height // spec.size, width // spec.size


def _scaled(size: Size, longest: int) -> Size:
    """Returns the size whose longer side is `longest`; the other one is made even before `LONGEST` bounds both."""
    ratio = size[0] / size[1]
    if size[0] >= size[1]:
        other = _even(int(longest / ratio))
        scaled = (longest, max(1, other))
    else:
        scaled = (max(1, _even(int(longest * ratio))), longest)
    if longest <= LONGEST:
        return scaled
    ratio = scaled[0] / scaled[1]
    if scaled[0] >= scaled[1]:
        return LONGEST, max(1, int(LONGEST / ratio))
    return max(1, int(LONGEST * ratio)), LONGEST


def _even(side: int) -> int:
    return side + side % 2


def _canvas(size: Size, side: int) -> Size:
    """Returns the size in whole tiles of `side`: the longer side is filled up, the other one follows and is too."""
    ratio = size[0] / size[1]
    if size[0] >= size[1]:
        width = math.ceil(size[0] / side) * side
        return width, max(1, math.ceil(int(width / ratio) / side)) * side
    height = math.ceil(size[1] / side) * side
    return max(1, math.ceil(int(height * ratio) / side)) * side, height
