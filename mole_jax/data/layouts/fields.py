"""Fields that several layouts have under some name: text, images, a system prompt, earlier turns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.data.containers.json_file import kind
from mole_jax.data.conversation import Role
from mole_jax.data.layouts.layout import Fail, Parts, Said, check_text, images

IMAGES = ("images", "image")
"""Names of the field with a record's images."""


def absent(value: Any) -> bool:
    """Returns whether a field has no value: null, or the NaN that pandas writes."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def first_of(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Returns the first of `names` that has a value in `record`; the first of all where none has."""
    return next((name for name in names if not absent(record.get(name))), names[0])


def text(record: Mapping[str, Any], field: str, fail: Fail) -> str:
    """Returns the text of a field that must be there; a number (of a table, say) becomes text."""
    value = record.get(field)
    if absent(value):
        raise fail(field, "missing; fill it in or take the record out")
    return as_text(value, field, fail)


def as_text(value: Any, field: str, fail: Fail) -> str:
    """Returns text, or a number as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise fail(field, f"expected text, found {kind(value)}")
    check_text(value, field, fail)
    return value


def optional_text(record: Mapping[str, Any], field: str, fail: Fail) -> str:
    """Returns the text of a field that may be absent or null, which is the empty text."""
    return "" if absent(record.get(field)) else text(record, field, fail)


def said(role: Role, record: Mapping[str, Any], field: str, fail: Fail) -> Said:
    """Returns the turn whose text stands in one field."""
    return Said(role, text(record, field, fail), field, field)


def system(record: Mapping[str, Any], fail: Fail) -> tuple[Said, ...]:
    """Returns the turn that the field `system` makes; none where it is absent or empty."""
    words = optional_text(record, "system", fail)
    return (Said("system", words, "system", "system"),) if words.strip() else ()


def history(record: Mapping[str, Any], fail: Fail) -> tuple[Said, ...]:
    """Returns the turns of `history`, a list of pairs (question, answer), the earliest first."""
    pairs = record.get("history")
    if absent(pairs):
        return ()
    if not isinstance(pairs, list | tuple):
        raise fail("history", f"expected a list of pairs of question and answer, found {kind(pairs)}")
    turns = []
    for i, pair in enumerate(pairs):
        place = f"history[{i}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise fail(place, "expected a pair of question and answer; write [question, answer]")
        for role, one in zip(("user", "assistant"), pair, strict=True):
            turns.append(Said(role, as_text(one, place, fail), place, place))
    return tuple(turns)


def images_of(record: Mapping[str, Any], fail: Fail, names: Sequence[str] = IMAGES) -> tuple[tuple, str]:
    """Returns the images of the first of `names` that has any, and which that is."""
    field = first_of(record, names)
    found = record.get(field)
    return (() if absent(found) else images(found, field, fail)), field


def question_and_answer(
    record: Mapping[str, Any], question: str, answer: Said, fail: Fail, names: Sequence[str] = IMAGES
) -> Parts:
    """Returns the parts of a record of one question, whose text marks no place for the images."""
    pictures, field = images_of(record, fail, names)
    return Parts((said("user", record, question, fail), answer), pictures, field, first=True)
