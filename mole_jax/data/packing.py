"""Packing: whole examples into open rows, the fullest that has place first, and none left waiting for long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mole_jax.data.batch import Row, padded
from mole_jax.data.tiling.pictures import moved

PATIENCE = 8
"""A row is given out before fuller ones when this many times `bins` rows were since it was opened."""


@dataclasses.dataclass(eq=False)
class OpenRow:
    """A row that examples still go into."""

    opened: int
    """Rows that had been given out before it was opened."""
    examples: list[tuple[int, Mapping[str, Any]]] = dataclasses.field(default_factory=list)
    """Number in the stream and element (as `Loader` makes it) of each example."""
    tokens: int = 0
    tiles: int = 0

    def add(self, number: int, element: Mapping[str, Any]) -> None:
        self.examples.append((number, element))
        self.tokens += len(element["tokens"])
        self.tiles += len(element["images"])


class Packer:
    """Best fit into at most `bins` open rows (bounded best fit: Csirik and Johnson, Algorithmica 31, 2001).

    An example goes into the fullest open row that has place for its tokens, its tiles and one more example.
    When it fits into none, the fullest is given out and a new one is opened; by `PATIENCE` an odd length that
    nothing fits to is not kept back for ever. A row is as full as the scarcest of its three places.
    """

    def __init__(self, *, sequence_length: int, tiles_per_row: int, examples_per_row: int, bins: int):
        self._most = (sequence_length, tiles_per_row, examples_per_row)
        self._bins = bins
        self.given = 0
        """Rows given out so far."""
        self.open: list[OpenRow] = []
        """In the order of opening."""

    def add(self, number: int, element: Mapping[str, Any]) -> OpenRow | None:
        """Puts an example, which by itself fits a row, into a row; returns the row that made place for it, if any."""
        size = (len(element["tokens"]), len(element["images"]), 1)
        fitting = [
            row
            for row in self.open
            if all(used + more <= most for used, more, most in zip(_used(row), size, self._most, strict=True))
        ]
        given = self.give() if not fitting and len(self.open) == self._bins else None
        if not fitting:
            fitting = [OpenRow(self.given)]
            self.open += fitting
        max(fitting, key=self._fullness).add(number, element)
        return given

    def give(self) -> OpenRow | None:
        """Takes out the row whose turn it is; None when no row is open."""
        if not self.open:
            return None
        late = self.given - self.open[0].opened >= PATIENCE * self._bins
        chosen = self.open[0] if late else max(self.open, key=self._fullness)
        self.open.remove(chosen)
        self.given += 1
        return chosen

    def _fullness(self, row: OpenRow) -> float:
        return max(used / most for used, most in zip(_used(row), self._most, strict=True) if most)


def _used(row: OpenRow) -> tuple[int, int, int]:
    return row.tokens, row.tiles, len(row.examples)


def row_of(packed: OpenRow, *, length: int, image_slots: int, pad_id: int, tile_features: int) -> Row:
    """Returns a packed row of S = `length` positions, with `pad_id` at padding; a tile has `tile_features`."""
    elements = [element for _, element in packed.examples]
    sizes = [len(element["tokens"]) for element in elements]

    def joined(parts: list[np.ndarray], fill: int = 0, kind: type = np.int32) -> np.ndarray:
        return padded(np.concatenate(parts), length, fill, kind)

    images = np.zeros((image_slots, *elements[0]["images"].shape[1:]), np.uint8)
    images[: packed.tiles] = np.concatenate([element["images"] for element in elements])
    places: dict[str, np.ndarray] = {}
    if "sources" in elements[0]:
        before = np.cumsum([0, *(len(element["images"]) for element in elements)]) * tile_features
        own = zip(elements, before, strict=False)
        places["sources"] = joined([moved(one["sources"], one["weights"], int(by)) for one, by in own])
        places["weights"] = joined([element["weights"] for element in elements], kind=np.float32)
    return Row(
        tokens=joined([element["tokens"] for element in elements], pad_id),
        supervised=joined([element["supervised"] for element in elements]),
        positions=joined([np.arange(size) for size in sizes]),
        segment_ids=joined([np.full(size, i) for i, size in enumerate(sizes, start=1)]),
        domain_ids=joined([np.full(size, element["domain"]) for size, element in zip(sizes, elements, strict=True)]),
        images=images,
        record_ids=tuple(element["record_id"] for element in elements),
        tiles=packed.tiles,
        **places,
    )
