"""A base view, then a grid of tiles of the best of some resolutions, as in LLaVA-NeXT and LLaVA-OneVision.

The features of the grid make one map in which those of the padding are left out, a long map is shrunk
(`AnyRes.most`), and a learned newline follows each of its rows.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from mole_jax.data.tiling.squares import Size, divided, grid_features, resized, squared, stacked, too_thin
from mole_jax.image_spec import NEWLINE, AnyRes, ImageSpec, PictureLayout

SHRINK_FROM = 1.1
"""A map is shrunk if its sides are longer than those of `AnyRes.most` tiles by more than this factor."""


def layout(spec: ImageSpec, tiling: AnyRes, size: Size, pictures: int, image_text: str) -> PictureLayout:
    """Returns the base view's features, then those of the grid, row by row with a newline after each.

    A picture that is not cut (`AnyRes.alone`) is its base view and one newline.

    Raises:
        UserError: the picture is so thin that nothing of it would be left.
    """
    base = np.arange(spec.tile_features)
    if is_whole(tiling, pictures):
        source = np.append(base, NEWLINE).astype(np.int32)[:, None]
        return PictureLayout(1, image_text, (len(source),), source)
    height, width = best_resolution(tiling, size)
    rows, columns = height // spec.size, width // spec.size
    features = _unpadded(grid_features(spec, rows, columns, first=1), size)
    source, weight = _shrunk(features, tiling.most, spec.side, size)
    source, weight = _with_base_and_newlines(base, source, weight)
    return PictureLayout(
        1 + rows * columns, image_text, (len(source),), source, None if weight.shape[1] == 1 else weight
    )


def cut(rgb: Image.Image, spec: ImageSpec, tiling: AnyRes, pictures: int) -> UInt8[np.ndarray, "N H W 3"]:
    """Returns the base view, made square as `spec.fit` says, and the tiles of the picture on black.

    A picture that is not cut is padded, as transformers does.
    """
    if is_whole(tiling, pictures):
        return stacked([squared(rgb, spec, "pad")])
    height, width = best_resolution(tiling, rgb.size)
    inner = _fitting(rgb.size, (width, height))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized(rgb, inner, spec), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return stacked([squared(rgb, spec, spec.fit), *divided(canvas, spec.size)])


def is_whole(tiling: AnyRes, pictures: int) -> bool:
    """Tells whether a picture, one of `pictures` in its example, stays uncut."""
    return tiling.alone and pictures > 1


def best_resolution(tiling: AnyRes, size: Size) -> tuple[int, int]:
    """Returns the resolution (height, width) that keeps most of a picture's pixels; of several, the smallest.

    Raises:
        UserError: the picture is so thin that none keeps any.
    """
    width, height = size

    def kept(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, -(resolution[0] * resolution[1] - pixels)

    best = max(tiling.resolutions, key=kept)
    if not kept(best)[0]:
        raise too_thin(size)
    return best


def _fitting(size: Size, room: Size) -> Size:
    """Returns the size that a picture takes in a room of which it fills one side."""
    width, height = room[0] / size[0], room[1] / size[1]
    if width < height:
        return room[0], min(math.ceil(size[1] * width), room[1])
    return min(math.ceil(size[0] * height), room[0]), room[1]


def _unpadded(features: Int[np.ndarray, "h w"], size: Size) -> Int[np.ndarray, "a b"]:
    """Leaves out the features of the padding: as many on both sides, and not more than whole rows or columns of it."""
    height, width = features.shape
    if size[0] / size[1] > width / height:
        # Rounded first, or a product that should be whole may end just below.
        padding = (height - int(round(size[1] * (width / size[0]), 7))) // 2
        return features[padding : height - padding]
    padding = (width - int(round(size[0] * (height / size[1]), 7))) // 2
    return features[:, padding : width - padding]


def _shrunk(
    features: Int[np.ndarray, "h w"], most: int | None, side: int, size: Size
) -> tuple[Int[np.ndarray, "a b K"], Float[np.ndarray, "a b K"]]:
    """Returns features and their shares; K is 4 where the map is shrunk to the size of about `most` tiles, else 1."""
    height, width = features.shape
    ratio = 0.0 if most is None else math.sqrt(height * width / (most * side**2))
    if ratio <= SHRINK_FROM:
        return features[..., None], np.ones((height, width, 1))
    rows, columns = _taps(height, int(height // ratio)), _taps(width, int(width // ratio))
    if not len(rows[0]) or not len(columns[0]):
        raise too_thin(size)
    source = features[rows[0][:, None, :, None], columns[0][None, :, None, :]]
    weight = rows[1][:, None, :, None] * columns[1][None, :, None, :]
    return source.reshape(*source.shape[:2], 4), weight.reshape(*weight.shape[:2], 4)


def _taps(old: int, new: int) -> tuple[Int[np.ndarray, "new 2"], Float[np.ndarray, "new 2"]]:
    """Returns the two neighbours of each place of a line of `old` that becomes `new` long, and their linear shares.

    Centres of pixels lie on centres, as with ``align_corners=False`` in torch's ``interpolate``; nothing is averaged.
    """
    centre = np.maximum((np.arange(new) + 0.5) * (old / max(1, new)) - 0.5, 0)
    before = np.floor(centre).astype(int)
    share = centre - before
    return np.stack([before, np.minimum(before + 1, old - 1)], -1), np.stack([1 - share, share], -1)


def _with_base_and_newlines(
    base: Int[np.ndarray, " F"], source: Int[np.ndarray, "a b K"], weight: Float[np.ndarray, "a b K"]
) -> tuple[Int[np.ndarray, "T K"], Float[np.ndarray, "T K"]]:
    rows, _, taps = source.shape
    only = np.eye(1, taps)  # all of the first
    newline = np.full((rows, 1, taps), NEWLINE)
    source = np.concatenate([source, newline], 1).reshape(-1, taps)
    weight = np.concatenate([weight, np.broadcast_to(only, newline.shape)], 1).reshape(-1, taps)
    source = np.concatenate([np.repeat(base[:, None], taps, 1), source])
    weight = np.concatenate([np.repeat(only, len(base), 0), weight])
    return source.astype(np.int32), weight.astype(np.float32)
