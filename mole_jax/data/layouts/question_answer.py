"""Columns `question` and `answer` with `image` or `images`; several right answers in `answers`.

So the hub has VQA-RAD, PathVQA, TextVQA, DocVQA and many more. Without `answer`, the most frequent of `answers` is
trained on.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts import layout
from mole_jax.data.layouts.fields import absent, question_and_answer, said
from mole_jax.data.layouts.layout import Fail, Layout, Parts, Said


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has a question and an answer."""
    return "question" in record and ("answer" in record or "answers" in record)


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    return question_and_answer(record, "question", answered(record, fail), fail)


def answered(record: Mapping[str, Any], fail: Fail) -> Said:
    """Returns the turn with `answer`, or with the most frequent of `answers`."""
    if absent(record.get("answer")) and (several := layout.answers(record, fail)):
        ((most, _),) = collections.Counter(several).most_common(1)
        return Said("assistant", most, "answers", "answers")
    return said("assistant", record, "answer", fail)


LAYOUT = Layout("question_answer", ("question", "answer"), fits, read)
