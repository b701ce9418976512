"""The door of the tilings: from a picture's size to its layout, from its pixels to its tiles.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from mole_jax.data.tiling import anyres, grid, single, split
from mole_jax.data.tiling.squares import Size
from mole_jax.errors import UserError
from mole_jax.image_spec import NEWLINE, AnyRes, Grid, ImageSpec, PictureLayout, Single, Split


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


def places(
    spec: ImageSpec, is_image: Bool[np.ndarray, " T"], layouts: Sequence[PictureLayout]
) -> tuple[Int[np.ndarray, "T K"], Float[np.ndarray, "T K"]]:
    """Returns which features, of all tiles of an example in order, each of its positions receives, and their shares.

    Args:
        spec: how the model takes pictures.
        is_image: where the image tokens are; as many as the layouts have positions.
        layouts: of the example's pictures.

    Returns:
        Indices as in `PictureLayout.source` and shares. Elsewhere, and beyond the K of a layout, both are 0.
    """
    sources = np.zeros((len(is_image), taps(spec)), np.int32)
    weights = np.zeros(sources.shape, np.float32)
    at, before = np.flatnonzero(is_image), 0
    for one in layouts:
        own, at = at[: len(one.source)], at[len(one.source) :]
        most = one.source.shape[1]
        sources[own, :most] = np.where(one.source == NEWLINE, NEWLINE, one.source + before * spec.tile_features)
        weights[own, :most] = 1 if one.weight is None else one.weight
        before += one.tiles
    return sources, weights


def moved(sources: Int[np.ndarray, "T K"], weights: Float[np.ndarray, "T K"], by: int) -> Int[np.ndarray, "T K"]:
    """Returns `sources` of an example in whose row `by` features come before its own."""
    return np.where((sources == NEWLINE) | (weights == 0), sources, sources + by)


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


def row_taps(spec: ImageSpec) -> int | None:
    """Returns K of a row's `sources`; None where it has none, since each picture is one tile."""
    return None if isinstance(spec.tiling, Single) else taps(spec)
