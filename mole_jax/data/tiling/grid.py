"""Tiles of the grid with the closest aspect ratio, then a thumbnail if there are several, as in InternVL."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mole_jax.data.tiling.squares import Size, divided, resized, stacked
from mole_jax.image_spec import Grid, ImageSpec, PictureLayout


def layout(spec: ImageSpec, tiling: Grid, size: Size, image_text: str) -> PictureLayout:
    """Returns the features of all tiles, one after the other, between the two marks."""
    columns, rows = best_grid(spec, tiling, size)
    tiles = columns * rows + (columns * rows > 1)
    count = tiles * spec.tile_features
    source = np.arange(count, dtype=np.int32)[:, None]
    return PictureLayout(tiles, f"{tiling.start}{image_text}{tiling.end}", (count,), source)


def cut(rgb: Image.Image, spec: ImageSpec, tiling: Grid) -> UInt8[np.ndarray, "N H W 3"]:
    """Returns the tiles of the stretched picture, row after row, and the thumbnail."""
    columns, rows = best_grid(spec, tiling, rgb.size)
    tiles = divided(resized(rgb, (columns * spec.size, rows * spec.size), spec), spec.size)
    if len(tiles) > 1:
        tiles.append(resized(rgb, (spec.size, spec.size), spec))
    return stacked(tiles)


def best_grid(spec: ImageSpec, tiling: Grid, size: Size) -> tuple[int, int]:
    """Returns columns and rows of the grid whose aspect ratio is closest to a picture's.

    Of equal ones the largest whose area is less than twice the picture's, as far as they come after the smallest.
    """
    ratio, area = size[0] / size[1], size[0] * size[1]
    most = range(1, tiling.most + 1)
    grids = [(x, y) for x in most for y in most if tiling.least <= x * y <= tiling.most]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    best, least = (1, 1), float("inf")
    for columns, rows in grids:
        apart = abs(ratio - columns / rows)
        larger = apart == least and area > 0.5 * spec.size**2 * columns * rows
        if apart < least or larger:
            best, least = (columns, rows), apart
    return best
