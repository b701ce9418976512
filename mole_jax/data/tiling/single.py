"""The whole picture as one square tile, as in LLaVA-1.5."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mole_jax.data.tiling.squares import squared, stacked
from mole_jax.image_spec import ImageSpec, PictureLayout


def layout(spec: ImageSpec, image_text: str) -> PictureLayout:
    """Returns the tile's features, in order."""
    count = spec.tile_features
    return PictureLayout(1, image_text, (count,), np.arange(count, dtype=np.int32)[:, None])


def cut(rgb: Image.Image, spec: ImageSpec) -> UInt8[np.ndarray, "1 H W 3"]:
    """Returns the picture made square as `spec.fit` says."""
    return stacked([squared(rgb, spec, spec.fit)])
