"""The door of the tilings: from a picture's size to its layout, from its pixels to its tiles.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mole_jax.data.tiling import anyres, grid, single, split
from mole_jax.data.tiling.squares import Size
from mole_jax.errors import UserError
from mole_jax.image_spec import AnyRes, Grid, ImageSpec, PictureLayout, Single, Split


def layout(spec: ImageSpec, size: Size, pictures: int, image_text: str) -> PictureLayout:
    """Returns where the features of a picture go, from its size alone.

    Args:
        spec: how the model takes pictures.
        size: of the picture; a single tile is the same for any.
        pictures: how many its example has.
        image_text: text of the image token.

    Raises:
        UserError: the picture is so thin that no tiles fit to it.
    """
    match spec.tiling:
        case Single():
            return single.layout(spec, image_text)
        case AnyRes() as tiling:
            return anyres.layout(spec, tiling, size, pictures, image_text)
        case Split() as tiling:
            return split.layout(spec, tiling, size, image_text)
        case Grid() as tiling:
            return grid.layout(spec, tiling, size, image_text)


def cut(rgb: Image.Image, spec: ImageSpec, pictures: int = 1) -> UInt8[np.ndarray, "N H W 3"]:
    """Returns the tiles of a picture in RGB, as many as its layout says; raises `UserError` as `layout` does."""
    match spec.tiling:
        case Single():
            return single.cut(rgb, spec)
        case AnyRes() as tiling:
            return anyres.cut(rgb, spec, tiling, pictures)
        case Split() as tiling:
            return split.cut(rgb, spec, tiling)
        case Grid() as tiling:
            return grid.cut(rgb, spec, tiling)


def layouts(spec: ImageSpec, sizes: Sequence[Size], image_text: str) -> tuple[PictureLayout, ...]:
    """Returns the layout of each picture of one example."""
    return tuple(layout(spec, size, len(sizes), image_text) for size in sizes)


def limited(spec: ImageSpec, most: int | None) -> ImageSpec:
    """Returns how the model takes pictures if none may have more than `most` tiles; None: as before.

    The tiling's own settings are lowered, as a processor's can be: resolutions left out, fewer tiles of a grid, a
    shorter longest side.

    Raises:
        UserError: no resolution is small enough.
    """
    if most is None or isinstance(spec.tiling, Single):
        return spec
    return dataclasses.replace(spec, tiling=_limited(spec, most))


def _limited(spec: ImageSpec, most: int) -> AnyRes | Split | Grid:
    match spec.tiling:
        case AnyRes(resolutions) as tiling:
            tiles = {one: 1 + one[0] * one[1] // spec.size**2 for one in resolutions}
            kept = tuple(one for one in resolutions if tiles[one] <= most)
            if not kept:
                raise UserError(
                    f"config: data.max_tiles {most} is less than the {min(tiles.values())} tiles of the smallest "
                    "resolution that the base cuts pictures to; raise it"
                )
            return dataclasses.replace(tiling, resolutions=kept)
        case Split() as tiling:
            # A square has most tiles: side x side of them and the global view.
            side = max(1, math.isqrt(max(0, most - 1)))
            return dataclasses.replace(tiling, longest=min(tiling.longest, side * spec.size))
        case Grid() as tiling:
            # Several tiles come with a thumbnail.
            tiles = min(tiling.most, max(1, most - 1))
            return dataclasses.replace(tiling, most=tiles, least=min(tiling.least, tiles))
    raise AssertionError(f"a single tile has no limit: {spec.tiling}")


def most_tiles(spec: ImageSpec) -> int:
    """Returns the largest number of tiles that a picture can have."""
    match spec.tiling:
        case Single():
            return 1
        case AnyRes(resolutions):
            return 1 + max(height * width // spec.size**2 for height, width in resolutions)
        case Split(longest, is_split):
            side = math.ceil(min(longest, split.LONGEST) / spec.size)
            return side**2 + 1 if is_split and side > 1 else 1
        case Grid(_, most):
            return most + (most > 1)


def taps(spec: ImageSpec) -> int:
    """Returns K of `PictureLayout`, the most features that make one image position."""
    return 4 if isinstance(spec.tiling, AnyRes) and spec.tiling.most is not None else 1
