"""M3IT: `instruction`, `inputs`, `outputs`, and images in base64, `image_base64_str` or `img_str`.

Source: Li et al. 2023 (arXiv 2306.04387), MMInstruction/M3IT. The question is the instruction and, in a new line, the
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.data.containers.json_file import kind
from mole_jax.data.layouts.fields import absent, first_of, optional_text, said, text
from mole_jax.data.layouts.layout import Fail, Layout, Parts, Said, base64_url

IMAGES = ("image_base64_str", "img_str")


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has an instruction and outputs."""
    return "instruction" in record and "outputs" in record


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    query = "\n".join(filter(str.strip, (text(record, "instruction", fail), optional_text(record, "inputs", fail))))
    question = Said("user", query, "instruction", "instruction")
    field = first_of(record, IMAGES)
    value = record.get(field)
    several: list[Any] = [] if absent(value) else list(value) if isinstance(value, list | tuple) else [value]
    for one in several:
        if not isinstance(one, str) or not one:
            raise fail(field, f"expected an image in base64, found {kind(one) if one != '' else 'empty text'}")
    images = tuple(map(base64_url, several))
    return Parts((question, said("assistant", record, "outputs", fail)), images, field, first=True)


LAYOUT = Layout("m3it", ("instruction", "inputs", "outputs", "image_base64_str"), fits, read)
