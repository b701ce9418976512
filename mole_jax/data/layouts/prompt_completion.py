"""TRL's `prompt` and `completion`, each text or a list of messages, and `images`.

Source: TRL's dataset formats (prompt-completion, standard and conversational; vision).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts import messages
from mole_jax.data.layouts.fields import images_of, said, system
from mole_jax.data.layouts.layout import Fail, Layout, Parts


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has a prompt and a completion."""
    return "prompt" in record and "completion" in record


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    listed = [isinstance(record.get(field), list | tuple) for field in ("prompt", "completion")]
    if any(listed):
        if not all(listed):
            odd = ("prompt", "completion")[listed.index(False)]
            raise fail(odd, "is no list of messages, which the other one is; write both in one way")
        return messages.parts_of(record, ("prompt", "completion"), fail)
    turns = (said("user", record, "prompt", fail), said("assistant", record, "completion", fail))
    return Parts(system(record, fail) + turns, *images_of(record, fail), first=True)


LAYOUT = Layout("prompt_completion", ("prompt", "completion"), fits, read)
