"""From the raw record of any layout to a checked `Example`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mole_jax.data.containers.json_file import kind
from mole_jax.data.conversation import Example, Turn, image_count
from mole_jax.data.layouts import llava
from mole_jax.data.layouts.layout import Fail, Layout, check_text
from mole_jax.data.layouts.table import UNKNOWN
from mole_jax.errors import UserError
from mole_jax.prompts import IMAGE
from mole_jax.terminal import shortened

_NAME: Any = re.compile(r"([^.\[]*)(.*)", re.DOTALL)
"""A field's name and the place within it."""


def parse_record(
    raw: Any,
    *,
    file: str,
    index: int,
    domain: str,
    layout: Layout = llava.LAYOUT,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Example:
    """Checks a raw record and returns it as an `Example`.

    A system turn may stand first. A leading turn of the assistant is left out, as LLaVA does. Without `id`, or where it
    is null, the index is the id.

    Args:
      raw: the record as its container gives it.
      file, index: where it stands (counted from 0), for messages.
      domain: name of its domain.
      layout: which fields hold what.
      columns: what the file calls fields that `raw` has by our names, for messages.

    Raises:
      UserError: a field is missing or of another type, an unknown role, turns that do not alternate, no
        answer, or `<image>` and images that do not match. It names the file, the record and the field.
    """
    identity, fail = identified(raw, file=file, index=index, layout=layout, columns=columns)
    parts = layout.read(raw, fail)
    turns = list(parts.turns)
    system = turns[:1] if turns and turns[0].role == "system" else []
    rest = turns[len(system) :]
    if rest and rest[0].role == "assistant":
        del rest[0]
    for place, turn in enumerate(rest):
        if turn.role == "system":
            raise fail(turn.role_field, "a system turn stands after others; put it first")
        if turn.role != ("assistant" if place % 2 else "user"):
            raise fail(turn.role_field, f"two turns of one side follow each other ({turn.role}); join them")
    if len(rest) < 2:
        raise fail(_list_of(parts.turns, layout), "needs a question and an answer; add them or take the record out")
    if turns[-1].role == "user":
        raise fail(turns[-1].role_field, "the last turn is the human's, so it has no answer; add one")
    for turn in system + rest:
        if not turn.text.strip():
            raise fail(turn.field, "the text is empty; fill it in or take the record out")
    kept = tuple(Turn(turn.role, turn.text, turn.supervised) for turn in system + rest)
    marks = image_count(kept)
    if parts.first and not marks and parts.images:
        kept, marks = _with_images_first(kept, len(parts.images)), len(parts.images)
    if marks != len(parts.images):
        raise fail(
            parts.image_field,
            f"{len(parts.images)} image(s) but {marks} {IMAGE} in the text; write one {IMAGE} in a human turn for each "
            "image",
        )
    for turn in rest:
        if turn.role == "assistant" and IMAGE in turn.text:
            raise fail(
                _list_of(parts.turns, layout), f"{IMAGE} stands in an answer; move it into the human turn before"
            )
    return Example(identity, domain, kept, parts.images)


def identified(
    raw: Any,
    *,
    file: str,
    index: int,
    layout: Layout = llava.LAYOUT,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, Fail]:
    """Returns the id of a record, and what makes errors about it; the arguments are those of `parse_record`.

    Raises:
      UserError: it is no object, or its id is no text and no number.
    """
    where = f"{file}: record {index}"

    def fail(field: str, problem: str) -> UserError:
        name, rest = _NAME.fullmatch(field).groups()
        told = "" if layout in (llava.LAYOUT, UNKNOWN) else f" of layout {layout.name}"
        return UserError(f"{where}, field {shortened(columns.get(name, name))}{rest}{told}: {problem}")

    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected an object with the fields of layout {layout.name}, found {kind(raw)}")
    identity = raw.get("id")
    if identity is None or (isinstance(identity, float) and math.isnan(identity)):
        identity = index  # pandas writes null or NaN for an id that is not there
    if isinstance(identity, bool) or not isinstance(identity, str | int | float):
        raise fail("id", f"expected text or a number, found {kind(identity)}")
    identity = str(identity)
    check_text(identity, "id", fail)
    where += f" (id '{shortened(identity)}')"
    return identity, fail


def _with_images_first(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    place = next(i for i, turn in enumerate(turns) if turn.role == "user")
    marked = Turn("user", "\n".join([IMAGE] * count + [turns[place].text]))
    return (*turns[:place], marked, *turns[place + 1 :])


def _list_of(turns: tuple, layout: Layout) -> str:
    """Returns the field that holds the turns, by that of the first of them, or by the layout."""
    return turns[0].field.split("[")[0] if turns else layout.keys[0]
