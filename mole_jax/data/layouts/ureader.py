"""UReader: a list `image`, and `conversations` of the image mark, the question and the answer.

Source: UReader (Ye et al. 2023, arXiv 2310.05126), its JSONL. The image is a turn of the user of its own: turns of one
side that follow each other are joined by a line break. An image ``NAME.tif.N`` is page N of a TIFF
(`mole_jax.data.image`). The answer ``None`` is text as any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts import llava
from mole_jax.data.layouts.layout import Fail, Layout, Parts, Said, images
from mole_jax.prompts import IMAGE

MARKS = (IMAGE, "<|image|>")


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether the first turn of `record` is nothing but marks of images."""
    turns = record.get("conversations")
    if not isinstance(turns, list | tuple) or len(turns) < 3 or not isinstance(turns[0], Mapping):
        return False
    first = turns[0].get("value")
    same = isinstance(turns[1], Mapping) and turns[1].get("from") == turns[0].get("from")
    return same and isinstance(first, str) and IMAGE in _marked(first) and not _marked(first).replace(IMAGE, "").strip()


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    turns: list[Said] = []
    for turn in llava.conversation(record, fail):
        turn = dataclasses.replace(turn, text=_marked(turn.text))
        if turns and turns[-1].role == turn.role:
            turns[-1] = dataclasses.replace(turn, text=f"{turns[-1].text}\n{turn.text}")
        else:
            turns.append(turn)
    return Parts(tuple(turns), images(record.get("image"), "image", fail), "image")


def _marked(text: str) -> str:
    return text.replace(MARKS[1], IMAGE)


LAYOUT = Layout("ureader", ("conversations", "image"), fits, read)
