"""What data, model, families and serving agree on about a picture: tiles of pixels, and places in the token row.

A picture becomes one or several square tiles (`Tiling`), the tower and connector make `tile_features` vectors of each,
and a `PictureLayout`, known from the picture's size alone, says which of them go where in the token row.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mole_jax.clip import CLIP_MEAN, CLIP_STD

NEWLINE = -1
"""In `PictureLayout.source`: the learned newline vector in place of a tile's feature."""


@dataclasses.dataclass(frozen=True)
class Single:
    """The whole picture is one square tile, as in LLaVA-1.5."""


@dataclasses.dataclass(frozen=True)
class AnyRes:
    """A base view, then a grid of tiles of the best of some resolutions, as in LLaVA-NeXT and LLaVA-OneVision."""

    resolutions: tuple[tuple[int, int], ...]
    """Height and width of each, in pixels; multiples of a tile's side."""
    most: int | None = None
    """The grid's features are shrunk, bilinearly, to about those of so many tiles (`anyres_max_N`); None: never."""
    alone: bool = False
    """Only a picture that is the single one of its example is cut; of several each is its base view (OneVision)."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows and columns of tiles with marks of words between, then a global view, as in SmolVLM and Idefics3."""

    longest: int
    """The longer side is scaled to this, in pixels, before the picture is cut."""
    split: bool = True
    """Off: the global view alone."""
    before: str = "<fake_token_around_image>"
    whole: str = "<global-img>"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Tiles of the grid with the closest aspect ratio, then a thumbnail if there are several, as in InternVL."""

    least: int
    most: int
    start: str = "<img>"
    end: str = "</img>"


Tiling = Single | AnyRes | Split | Grid
Fit = Literal["pad", "crop", "stretch"]
Resample = Literal["bicubic", "lanczos", "bilinear"]
Exif = Literal["ignore", "apply"]
Transparency = Literal["stored", "white"]


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How a model takes a picture."""

    size: int
    """Side of a tile, in pixels."""
    side: int
    """The connector makes side x side features of a tile, in rows."""
    token_id: int
    """Token id at the positions that receive features."""
    first: int = 0
    """Features of a tile before those of its grid (the class token of a tower whose features are taken "full")."""
    vectors: bool = False
    """Learned vectors before and after the features of each tile (released LLaVA-MoLE)."""
    tiling: Tiling = Single()
    fit: Fit = "pad"
    """How a picture (of `Single`; the base view of others) becomes square where `data.image_aspect` does not say."""
    resample: Resample = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    """Of red, green and blue in [0, 1]: the device computes (pixel / 255 - mean) / std."""
    exif: Exif = "ignore"
    transparency: Transparency = "stored"
    """As `data.exif` and `data.transparency`, for whoever opens what was trained so."""

    @property
    def tile_features(self) -> int:
        """Vectors that the model makes of one tile."""
        return self.first + self.side**2 + 2 * self.vectors


class PictureLayout(NamedTuple):
    """Where one picture's features go: T image positions, each the weighted sum of K features of its tiles."""

    tiles: int
    text: str
    """What stands for the picture in the prompt: marks, with one image token (as text) for each run of positions."""
    runs: tuple[int, ...]
    """Image positions of each run; T in all."""
    source: Int[np.ndarray, "T K"]
    """Index into the picture's features, tile after tile (`ImageSpec.tile_features` each), or `NEWLINE`."""
    weight: Float[np.ndarray, "T K"] | None = None
    """Share of each; None: K is 1 and every share 1."""
