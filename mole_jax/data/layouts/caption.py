"""An image and its caption: `image` (or `images`, `jpg`, `png`) and `caption`, `text` or `txt`.

So WebDataset's samples of img2dataset are, and most sets of captions of the hub. The question is the image alone, as in
LLaVA's pretraining with the prompt preset plain. Several captions (COCO) are the references; the first is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts.fields import IMAGES, absent, as_text, first_of, images_of, said
from mole_jax.data.layouts.layout import Fail, Layout, Parts, Said
from mole_jax.prompts import IMAGE

TEXTS = ("caption", "text", "txt")
PICTURES = (*IMAGES, "jpg", "png")


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has an image and a caption."""
    return any(name in record for name in PICTURES) and any(name in record for name in TEXTS)


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    pictures, image_field = images_of(record, fail, PICTURES)
    if not pictures:
        raise fail(image_field, "missing; a caption needs its image, add it or take the record out")
    field = first_of(record, TEXTS)
    several = references(record, fail)
    answer = Said("assistant", several[0], field, field) if several else said("assistant", record, field, fail)
    question = Said("user", "\n".join([IMAGE] * len(pictures)), image_field, image_field)
    return Parts((question, answer), pictures, image_field)


def references(record: Mapping[str, Any], fail: Fail) -> tuple[str, ...] | None:
    """Returns the captions of a field that is a list of them; None where it is one text."""
    field = first_of(record, TEXTS)
    captions = record.get(field)
    if absent(captions) or not isinstance(captions, list | tuple):
        return None
    if not captions:
        raise fail(field, "the list is empty; fill in a caption or take the record out")
    return tuple(as_text(one, f"{field}[{i}]", fail) for i, one in enumerate(captions))


LAYOUT = Layout("caption", ("image", "caption"), fits, read, references)
