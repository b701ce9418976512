"""PMC-VQA's CSV: `Question`, `Choice A` to `Choice D`, `Answer` and `Figure_path`; the answer is the choice's letter.

Source: Zhang et al. 2023 (arXiv 2305.10415), RadGenome/PMC-VQA. The question is followed by the choices, one a line.
Some revisions spell the column `Anwser`; it holds the letter, or the choice's text and `Answer_label` the letter. For
free answers, force layout question_answer with columns such as ``question=Question``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts.fields import first_of, images_of, text
from mole_jax.data.layouts.layout import Fail, Layout, Parts, Said

LETTERS = "ABCD"
_ANSWERS = ("Answer_label", "Answer", "Anwser")


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has PMC-VQA's columns."""
    return "Question" in record and "Choice A" in record and any(name in record for name in _ANSWERS)


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    choices = {letter: _choice(record, letter, fail) for letter in LETTERS}
    field = first_of(record, _ANSWERS) if any(name in record for name in _ANSWERS) else "Answer"
    given = text(record, field, fail).strip()
    letter = given if given in choices else next((one for one, words in choices.items() if words == given), None)
    if letter is None:
        raise fail(field, f"is neither a letter of {', '.join(LETTERS)} nor the text of a choice; correct it")
    lines = [text(record, "Question", fail).strip(), *(f"{one}. {words}" for one, words in choices.items())]
    question = Said("user", "\n".join(lines), "Question", "Question")
    pictures, image_field = images_of(record, fail, ("Figure_path",))
    return Parts((question, Said("assistant", letter, field, field)), pictures, image_field, first=True)


def _choice(record: Mapping[str, Any], letter: str, fail: Fail) -> str:
    """Returns a choice without the letter that stands before it in the file."""
    return re.sub(rf"^\s*{letter}\s*[:.]\s*", "", text(record, f"Choice {letter}", fail)).strip()


LAYOUT = Layout("pmc_vqa", ("Question", "Choice A", "Answer", "Figure_path"), fits, read)
