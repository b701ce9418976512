"""Alpaca: `instruction`, `input`, `output`, and LLaMA-Factory's `system`, `history` and `images`.

Source: LLaMA-Factory's data/README.md (alpaca). The question is the instruction and, in a new line, the input. The text
has one ``<image>`` for each image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts.fields import history, images_of, optional_text, said, system, text
from mole_jax.data.layouts.layout import Fail, Layout, Parts, Said


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has an instruction and an output."""
    return "instruction" in record and "output" in record


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    query = "\n".join(filter(str.strip, (text(record, "instruction", fail), optional_text(record, "input", fail))))
    question = Said("user", query, "instruction", "instruction")
    turns = (*system(record, fail), *history(record, fail), question, said("assistant", record, "output", fail))
    return Parts(turns, *images_of(record, fail))


LAYOUT = Layout("alpaca", ("instruction", "output"), fits, read)
