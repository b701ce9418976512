"""Every tensor of a file is accounted for: what does not fit is told in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mole_jax.errors import UserError

Shape = tuple[int, ...]
_NAMED = 5  # a message names so many keys and counts the rest


def complain(
    where: str | Path,
    what: str,
    missing: Sequence[str] = (),
    unknown: Sequence[str] = (),
    shapes: Sequence[str] = (),
    twice: Sequence[str] = (),
) -> None:
    """Raises `UserError` that counts the tensors of each kind and names the first of them; returns if there are none.

    Args:
        where: the file or folder.
        what: what is wrong, in words.
        missing: names that should be there.
        unknown: names that mean nothing here.
        shapes: names of the wrong shape, with both shapes.
        twice: names that mean the same tensor.
    """
    problems = [
        f"{len(found)} {word}: {', '.join(found[:_NAMED])}{', …' if len(found) > _NAMED else ''}"
        for word, found in (
            ("missing", missing),
            ("unknown", unknown),
            ("of the wrong shape", shapes),
            ("given twice", twice),
        )
        if found
    ]
    if problems:
        raise UserError(f"{where}: {what}; " + "; ".join(problems))


def wrong_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], source: str) -> list[str]:
    """Returns a line for every tensor that is in both and differs; `source` says who asks for the shape."""
    return [
        f"{name} is {shape}, {source} asks for {expected[name]}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
