"""What data, model and serving agree on about an image."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How a model takes an image: a square of pixels, and positions in the token row that receive its features."""

    size: int
    """Side of the square, in pixels."""
    span: int
    """Positions in the token row."""
    token_id: int
    """Token id at these positions."""
