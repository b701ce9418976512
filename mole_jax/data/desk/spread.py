"""How numbers are spread: their ends and their middle, and bars of text."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BARS, WIDTH = 8, 40
"""Bars of a histogram, and the characters of its longest one."""


class Spread(NamedTuple):
    """Of some whole numbers; all 0 where there are none."""

    least: int
    middle: float
    """The median."""
    most: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        return cls(min(values), statistics.median(values), max(values)) if values else cls(0, 0, 0)


def bars(values: Sequence[int], most: int) -> Iterator[str]:
    """Yields a histogram of numbers from 1 to `most` as lines of text: the range, the count, the bar."""
    count = min(BARS, most)
    edges = [most * i // count for i in range(count + 1)]
    counts = [sum(low < value <= high for value in values) for low, high in itertools.pairwise(edges)]
    for (low, high), number in zip(itertools.pairwise(edges), counts, strict=True):
        bar = "█" * -(-number * WIDTH // max(1, *counts))
        yield f"{f'{low + 1:,} to {high:,}':>15}{number:>9} {bar}".rstrip()
