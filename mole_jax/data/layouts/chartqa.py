"""ChartQA: `query`, `label` (a text, or a list of right answers) and `imgname`, or `image` on the hub.

Source: Masry et al. 2022 (arXiv 2203.10244), vis-nlp/ChartQA; HuggingFaceM4/ChartQA. `imgname` is relative to ``png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts.fields import as_text, question_and_answer, said
from mole_jax.data.layouts.layout import Fail, Layout, Parts, Said


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has a query and a label."""
    return "query" in record and "label" in record


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    several = references(record, fail)
    answer = Said("assistant", several[0], "label", "label") if several else said("assistant", record, "label", fail)
    return question_and_answer(record, "query", answer, fail, ("imgname", "image"))


def references(record: Mapping[str, Any], fail: Fail) -> tuple[str, ...] | None:
    """Returns the right answers of a `label` that is a list; None where it is one text."""
    label = record.get("label")
    if not isinstance(label, list | tuple):
        return None
    if not label:
        raise fail("label", "the list is empty; fill in a right answer or take the record out")
    return tuple(as_text(one, f"label[{i}]", fail) for i, one in enumerate(label))


LAYOUT = Layout("chartqa", ("query", "label"), fits, read, references)
