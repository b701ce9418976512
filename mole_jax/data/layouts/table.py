"""The layouts that are known, and which of them the records of a domain have."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from mole_jax.data.layouts import (
    alpaca,
    caption,
    chartqa,
    llava,
    m3it,
    medical,
    messages,
    pmc_vqa,
    prompt_completion,
    query_response,
    question_answer,
    sharegpt,
    ureader,
)
from mole_jax.data.layouts.layout import Fail, Layout
from mole_jax.errors import UserError
from mole_jax.terminal import shortened

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        ureader.LAYOUT,
        llava.LAYOUT,
        sharegpt.LAYOUT,
        messages.LAYOUT,
        prompt_completion.LAYOUT,
        alpaca.LAYOUT,
        m3it.LAYOUT,
        query_response.LAYOUT,
        chartqa.LAYOUT,
        pmc_vqa.LAYOUT,
        medical.VQA_RAD,
        medical.SLAKE,
        medical.PATH_VQA,
        question_answer.LAYOUT,
        caption.LAYOUT,
    )
}
"""By name. The first whose keys all records have that were looked at is their layout."""
LOOKED_AT = 16
"""Records that are looked at: a few, for those of text alone have no key for images."""
_MOST_KEYS = 12
_LIKE_LAYOUT, _LIKE_KEY = 0.4, 0.6


def recognised(records: Iterable[Any]) -> Layout:
    """Returns the layout whose keys the first readable `records` have.

    Records that fit no layout are left out of it, as long as others fit one: they are told one by one. Where all are
    such, the layout is one that refuses each record with its keys and the nearest layout.

    Raises:
      UserError: they are of several layouts. The message lacks the file's name.
    """
    known = (record for record in records if isinstance(record, Mapping))
    fitting: dict[int, set[str]] = {}
    for number, record in enumerate(itertools.islice(known, LOOKED_AT)):
        if names := {layout.name for layout in LAYOUTS.values() if layout.fits(record)}:
            fitting[number] = names
    if not fitting:
        return UNKNOWN
    common = set.intersection(*fitting.values())
    if not common:
        first = next(iter(fitting))
        other = next(number for number, names in fitting.items() if not names & fitting[first])
        pair = " and ".join(_preferred(fitting[number]) for number in (first, other))
        raise UserError(f"has records of two layouts, {pair}; write a file of each, or set layout to read all as one")
    return LAYOUTS[_preferred(common)]


def _preferred(names: set[str]) -> str:
    return next(name for name in LAYOUTS if name in names)


def _fits_none(record: Mapping[str, Any]) -> bool:
    return not any(layout.fits(record) for layout in LAYOUTS.values())


def _refuse(record: Mapping[str, Any], fail: Fail) -> NoReturn:
    keys = list(map(str, record))
    shown = ", ".join(shortened(key, 40) for key in keys[:_MOST_KEYS]) + (", …" if len(keys) > _MOST_KEYS else "")
    likeness, nearest = max(((_likeness(keys, layout), layout) for layout in LAYOUTS.values()), key=lambda one: one[0])
    known = f"it has the keys {shown}" if keys else "it has no keys"
    if likeness < _LIKE_LAYOUT:
        raise fail(
            "(all)",
            f"is of no known layout: {known}; name them with columns, and one of the layouts {', '.join(LAYOUTS)}",
        )
    missing = [key for key in nearest.keys if key not in keys]
    raise fail(
        missing[0] if missing else nearest.keys[0],
        f"missing; is of no known layout: {known}. The nearest is {nearest.name} ({', '.join(nearest.keys)}): rename "
        f"them, or set columns{_renamings(keys, missing)}",
    )


def _likeness(keys: list[str], layout: Layout) -> float:
    """Returns how near the keys of a record come to a layout's, from 0 to 1."""
    return sum(max((_alike(own, key) for key in keys), default=0) for own in layout.keys) / len(layout.keys)


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _renamings(keys: list[str], missing: list[str]) -> str:
    """Returns an example of a `columns` for the names that are nearly right."""
    found = [(own, max(keys, key=lambda key: _alike(own, key))) for own in missing]
    sure = [f"{own}={shortened(key, 40)}" for own, key in found if _alike(own, key) >= _LIKE_KEY]
    return f", such as {sure[0]}" if sure else ""


UNKNOWN = Layout("unknown", (), _fits_none, _refuse)
"""What records have that no layout fits; reading one says so."""
