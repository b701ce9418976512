"""VQA-RAD, SLAKE and PathVQA: `question`, `answer` and the name of an image, each as its authors ship it.

- VQA-RAD (Lau et al. 2018, osf.io/89kps): one JSON list; `image_name`, relative to the folder of images.
- SLAKE (Liu et al. 2021, arXiv 2102.09542): train.json and others; `img_name`, relative to ``imgs``. `q_lang` is ``en``
  or ``zh``: a domain's `where` chooses, ``where=("q_lang=en",)``.
- PathVQA (He et al. 2020, arXiv 2003.10286): `image` without its suffix, such as ``train_0422``, relative to
  ``images/train``. Its pickle must be written as JSON first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts import question_answer
from mole_jax.data.layouts.fields import question_and_answer
from mole_jax.data.layouts.layout import Fail, Layout, Parts
from mole_jax.data.layouts.question_answer import answered

_PATH_VQA = re.compile(r"(train|val|test)_\d{4,}")


def _with(record: Mapping[str, Any], field: str) -> bool:
    return question_answer.fits(record) and field in record


def _read(record: Mapping[str, Any], field: str, fail: Fail) -> Parts:
    return question_and_answer(record, "question", answered(record, fail), fail, (field,))


def fits_vqa_rad(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has VQA-RAD's `image_name`."""
    return _with(record, "image_name")


def read_vqa_rad(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    return _read(record, "image_name", fail)


def fits_slake(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has SLAKE's `img_name`."""
    return _with(record, "img_name")


def read_slake(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    return _read(record, "img_name", fail)


def fits_path_vqa(record: Mapping[str, Any]) -> bool:
    """Returns whether the image of `record` is named as PathVQA's are, without a suffix."""
    name = record.get("image")
    return _with(record, "image") and isinstance(name, str) and _PATH_VQA.fullmatch(name) is not None


def read_path_vqa(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    name = record.get("image")
    if isinstance(name, str) and _PATH_VQA.fullmatch(name):
        record = {**record, "image": f"{name}.jpg"}
    return _read(record, "image", fail)


VQA_RAD = Layout("vqa_rad", ("question", "answer", "image_name"), fits_vqa_rad, read_vqa_rad)
SLAKE = Layout("slake", ("question", "answer", "img_name"), fits_slake, read_slake)
PATH_VQA = Layout("path_vqa", ("question", "answer", "image"), fits_path_vqa, read_path_vqa)
