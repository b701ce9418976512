"""The layouts that are known, and which of them a record has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts import llava
from mole_jax.data.layouts.layout import Layout

LAYOUTS: tuple[Layout, ...] = (llava.LAYOUT,)
"""The first that fits a record is its layout."""


def recognised(record: Any) -> Layout:
    """Returns the layout whose keys `record` has; LLaVA's where none fits, so that its reading says what is missing."""
    fitting = (layout for layout in LAYOUTS if isinstance(record, Mapping) and layout.fits(record))
    return next(fitting, llava.LAYOUT)
