"""ShareGPT: LLaVA's `conversations` with a list `images`, and perhaps a field `system`.

Source: LLaMA-Factory's data/README.md (sharegpt, multimodal). The text has one ``<image>`` for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts import llava
from mole_jax.data.layouts.fields import images_of, system
from mole_jax.data.layouts.layout import Fail, Layout, Parts


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has conversations; what is also LLaVA's is read as that."""
    return "conversations" in record


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    turns = llava.conversation(record, fail)
    before = () if turns and turns[0].role == "system" else system(record, fail)
    return Parts(before + turns, *images_of(record, fail))


LAYOUT = Layout("sharegpt", ("conversations", "images"), fits, read)
