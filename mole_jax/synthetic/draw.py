"""Drawing with numpy alone, so that a picture's pixels depend on no font file and no graphics library.

Pictures are uint8 (64, 64, 3), row 0 at the top; coordinates are pixels, x to the right and y downwards.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, UInt8

SIDE = 64
COLOURS = {
    "red": (220, 30, 30),
    "blue": (40, 70, 230),
    "green": (20, 170, 50),
    "yellow": (250, 225, 30),
    "purple": (150, 40, 190),
    "orange": (255, 140, 20),
}
SHAPES = ("ball", "box", "cone", "star", "ring", "cross")
SHAPE_SIDE = 17
GLYPH_WIDTH, GLYPH_HEIGHT = 12, 14
"""Pixels that a doubled 5 x 7 glyph takes, the gap to the next one included."""

# Seven rows of five bits each, the highest bit at the left.
_GLYPHS = {
    "A": "0E 11 11 1F 11 11 11",
    "B": "1E 11 11 1E 11 11 1E",
    "C": "0E 11 10 10 10 11 0E",
    "D": "1E 11 11 11 11 11 1E",
    "E": "1F 10 10 1E 10 10 1F",
    "F": "1F 10 10 1E 10 10 10",
    "G": "0E 11 10 17 11 11 0F",
    "H": "11 11 11 1F 11 11 11",
    "I": "0E 04 04 04 04 04 0E",
    "J": "07 02 02 02 02 12 0C",
    "K": "11 12 14 18 14 12 11",
    "L": "10 10 10 10 10 10 1F",
    "M": "11 1B 15 15 11 11 11",
    "N": "11 11 19 15 13 11 11",
    "O": "0E 11 11 11 11 11 0E",
    "P": "1E 11 11 1E 10 10 10",
    "Q": "0E 11 11 11 15 12 0D",
    "R": "1E 11 11 1E 14 12 11",
    "S": "0F 10 10 0E 01 01 1E",
    "T": "1F 04 04 04 04 04 04",
    "U": "11 11 11 11 11 11 0E",
    "V": "11 11 11 11 11 0A 04",
    "W": "11 11 11 15 15 15 0A",
    "X": "11 11 0A 04 0A 11 11",
    "Y": "11 11 11 0A 04 04 04",
    "Z": "1F 01 02 04 08 10 1F",
    "0": "0E 11 13 15 19 11 0E",
    "1": "04 0C 04 04 04 04 0E",
    "2": "0E 11 01 02 04 08 1F",
    "3": "1F 02 04 02 01 11 0E",
    "4": "02 06 0A 12 1F 02 02",
    "5": "1F 10 1E 01 01 11 0E",
    "6": "06 08 10 1E 11 11 0E",
    "7": "1F 01 02 04 08 08 08",
    "8": "0E 11 11 0E 11 11 0E",
    "9": "0E 11 11 0F 01 02 0C",
}


def canvas(colour: tuple[int, int, int]) -> UInt8[np.ndarray, "64 64 3"]:
    """A picture of one colour."""
    return np.broadcast_to(np.array(colour, np.uint8), (SIDE, SIDE, 3)).copy()


@functools.cache
def glyph(character: str) -> Bool[np.ndarray, "14 10"]:
    """Where ink stands in a capital letter or digit; raises `KeyError` for any other character."""
    rows = [int(row, 16) for row in _GLYPHS[character].split()]
    bits = np.array([[bool(row >> (4 - column) & 1) for column in range(5)] for row in rows])
    return bits.repeat(2, axis=0).repeat(2, axis=1)


def write(picture: UInt8[np.ndarray, "64 64 3"], text: str, x: int, y: int, ink: tuple[int, int, int]) -> None:
    """Writes `text` in place, its top left corner at (x, y); it must fit."""
    for index, character in enumerate(text):
        paint(picture, glyph(character), x + index * GLYPH_WIDTH, y, ink)


def paint(
    picture: UInt8[np.ndarray, "64 64 3"], mask: Bool[np.ndarray, "h w"], x: int, y: int, ink: tuple[int, int, int]
) -> None:
    """Colours in place the pixels under `mask`, whose top left corner is laid at (x, y)."""
    height, width = mask.shape
    picture[y : y + height, x : x + width][mask] = ink


@functools.cache
def shape(name: str) -> Bool[np.ndarray, "17 17"]:
    """Where a shape of `SHAPES` has colour."""
    y, x = np.mgrid[:SHAPE_SIDE, :SHAPE_SIDE] - SHAPE_SIDE // 2
    squared = x * x + y * y
    match name:
        case "ball":
            return squared <= 66
        case "ring":
            return (squared <= 66) & (squared >= 20)
        case "box":
            return (abs(x) <= 7) & (abs(y) <= 7)
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 2) & (np.maximum(abs(x), abs(y)) <= 8)
        case "cone":
            return _polygon((0, -8), (8, 8), (-8, 8))
        case "star":
            return _polygon((0, -8), (2, -3), (8, -3), (3, 1), (5, 8), (0, 4), (-5, 8), (-3, 1), (-8, -3), (-2, -3))
    raise ValueError(f"no shape '{name}', expected one of {', '.join(SHAPES)}")


@functools.cache
def outline(name: str) -> Bool[np.ndarray, "19 19"]:
    """The one-pixel rim around `shape(name)`; its corner lies one pixel up and left of the shape's."""
    inner = np.pad(shape(name), 1)
    grown = inner.copy()
    for axis in (0, 1):
        grown |= np.roll(inner, 1, axis) | np.roll(inner, -1, axis)
    return grown & ~inner


def _polygon(*corners: tuple[int, int]) -> Bool[np.ndarray, "17 17"]:
    """Even-odd fill of a polygon given around the centre, its edges included, in whole numbers."""
    y, x = np.mgrid[:SHAPE_SIDE, :SHAPE_SIDE] - SHAPE_SIDE // 2
    inside = np.zeros((SHAPE_SIDE, SHAPE_SIDE), bool)
    edge = inside.copy()
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        # Twice the signed area of (corner, corner, pixel): 0 on the line, its sign says on which side.
        side = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)
        inside ^= ((y0 <= y) != (y1 <= y)) & ((side < 0) if y1 > y0 else (side > 0))
        between = (np.minimum(x0, x1) <= x) & (x <= np.maximum(x0, x1)) & (np.minimum(y0, y1) <= y)
        edge |= (side == 0) & between & (y <= np.maximum(y0, y1))
    return inside | edge
