"""How full the rows are under other settings of the packing, by packing the sizes of examples that were drawn."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from mole_jax.config import DataConfig
from mole_jax.data.desk.show import drawn, without_limits
from mole_jax.data.load import Loader
from mole_jax.data.packing import Packer
from mole_jax.errors import UserError

ROWS, ROUNDS = 300, 30
"""Rows that are packed under each setting: at least so many, and so many times the rows open at a time."""
SETTINGS = ("packing_bins", "examples_per_row", "sequence_length", "tiles_per_row")
FACTORS = (0.25, 0.5, 2, 4)
NEAR = 0.005
"""A fill rate that is higher by less than this is no better."""

Size = tuple[int, int]
"""Tokens and tiles of an example."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """What one setting makes of the examples."""

    data: DataConfig
    fill: float
    """Share of the positions that are not padding."""
    tiles: float | None
    """Share of the places for tiles that have one; None: rows have none."""
    examples: float
    """In a row."""
    left_out: float
    """Share of the examples that are too long or have too many tiles."""

    def row(self) -> list[str]:
        """Returns the cells of a table."""
        tiles = "-" if self.tiles is None else f"{1 - self.tiles:.1%}"
        settings = [str(getattr(self.data, name)) for name in SETTINGS]
        return [
            *settings,
            f"{self.fill:.1%}",
            f"{1 - self.fill:.1%}",
            tiles,
            f"{self.examples:.1f}",
            f"{self.left_out:.1%}",
        ]


HEADING = [*SETTINGS, "fill", "padding", "tiles unused", "examples a row", "left out"]


def sizes(data: DataConfig, loader: Loader, count: int, *, seed: int) -> list[Size]:
    """Returns the sizes of the first `count` examples that training would draw, also those that do not fit a row.

    Raises:
        UserError: none of them can be used.
    """
    measuring = dataclasses.replace(without_limits(loader), decode=False)
    found = [
        (len(one.loaded.tokens), len(one.loaded.images))
        for one in itertools.islice(drawn(data, measuring, seed=seed), count)
        if one.loaded is not None
    ]
    if not found:
        raise UserError("none of the examples drawn can be used; `python -m mole_jax.data check` says why")
    return found


def variants(data: DataConfig) -> Iterator[DataConfig]:
    """Yields `data` as it is, and with each setting of the packing made smaller and larger by itself."""
    yield data
    for name in SETTINGS:
        value = getattr(data, name)
        for other in dict.fromkeys(max(1, round(value * factor)) for factor in FACTORS):
            if value and other != value:
                yield dataclasses.replace(data, **{name: other})


def pack(data: DataConfig, found: Sequence[Size], *, shards: int) -> Packed:
    """Packs examples of these sizes, over and over, as one of so many shards does."""
    bins = -(-data.packing_bins // shards)
    most: dict[str, int] = {name: getattr(data, name) for name in SETTINGS if name != "packing_bins"}
    fitting = [size for size in found if size[0] <= data.sequence_length and size[1] <= data.tiles_per_row]
    left_out = 1 - len(fitting) / len(found)
    if not fitting:
        return Packed(data, 0.0, 0.0, 0.0, left_out)
    packer = Packer(**most, bins=bins)
    rows = tokens = tiles = examples = 0
    for number, size in enumerate(itertools.cycle(fitting)):
        element: dict[str, Any] = {"tokens": range(size[0]), "images": range(size[1])}
        if (given := packer.add(number, element)) is None:
            continue
        rows, tokens, tiles = rows + 1, tokens + given.tokens, tiles + given.tiles
        examples += len(given.examples)
        if rows >= max(ROWS, ROUNDS * bins):
            break
    places = rows * data.tiles_per_row
    return Packed(
        data, tokens / (rows * data.sequence_length), tiles / places if places else None, examples / rows, left_out
    )


def best(packed: Sequence[Packed]) -> Packed:
    """Returns the one with the fullest rows, of those that leave out no more than the first, which is as configured."""
    first = packed[0]
    allowed = [one for one in packed if one.left_out <= first.left_out]
    top = max(allowed, key=lambda one: one.fill)
    return top if top.fill > first.fill + NEAR else first


def verdict(packed: Sequence[Packed]) -> str:
    """Returns what to do about it, in a line."""
    first, top = packed[0], best(packed)
    if top is first:
        return f"best: as configured, {first.fill:.1%} of the positions are filled"
    (name,) = (name for name in SETTINGS if getattr(top.data, name) != getattr(first.data, name))
    return f"best: data.{name} {getattr(top.data, name)}, with which {top.fill:.1%} is filled, not {first.fill:.1%}"


def told(packed: Sequence[Packed]) -> str:
    """Returns the table of them, the configured one first."""
    rows = [HEADING, *(one.row() for one in packed)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
