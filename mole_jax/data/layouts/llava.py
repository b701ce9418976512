"""LLaVA: ``id``, ``image`` (a path, a list of them, or none) and ``conversations`` of ``from`` and ``value``.

Source: LLaVA's docs/Finetune_Custom_Data.md. ``<image>`` stands in the text, once for each image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.data.containers.json_file import kind
from mole_jax.data.conversation import Role
from mole_jax.data.layouts.layout import Fail, Layout, Parts, Said, check_text, images
from mole_jax.errors import nearest
from mole_jax.terminal import shortened

ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether the keys of `record` are LLaVA's."""
    return "conversations" in record and not {"images", "system"} & record.keys()


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    return Parts(conversation(record, fail), images(record.get("image"), "image", fail), "image")


def conversation(record: Mapping[str, Any], fail: Fail) -> tuple[Said, ...]:
    """Returns the turns of `conversations`; raises `UserError` as `read` does."""
    if "conversations" not in record:
        raise fail("conversations", f"missing; {_remedy(record)}")
    conversations = record["conversations"]
    if not isinstance(conversations, list):
        raise fail("conversations", f"expected a list of turns, found {kind(conversations)}")
    return tuple(_turn(turn, f"conversations[{i}]", fail) for i, turn in enumerate(conversations))


def _remedy(raw: Mapping[str, Any]) -> str:
    """Returns what to do about a record without conversations."""
    if "messages" in raw:
        return "rename messages to conversations, and role and content in it to from and value"
    # Only of names that are nearly right: any other would be a guess.
    found = [name for name in map(str, raw) if nearest(name, ["conversations"], cutoff=0.8)]
    return f"rename '{shortened(found[0])}' to conversations" if found else "add the list of turns"


def _turn(turn: Any, field: str, fail: Fail) -> Said:
    if not isinstance(turn, Mapping):
        raise fail(field, f"expected an object with from and value, found {kind(turn)}")
    for key in ("from", "value"):
        if key not in turn:
            other = {"from": "role", "value": "content"}[key]
            remedy = f"rename {other} to {key}" if other in turn else "a turn is an object with from and value"
            raise fail(f"{field}.{key}", f"missing; {remedy}")
        if not isinstance(turn[key], str):
            raise fail(f"{field}.{key}", f"expected text, found {kind(turn[key])}")
    if turn["from"] not in ROLES:
        hint = nearest(turn["from"], ROLES) or f", expected one of {', '.join(ROLES)}"
        raise fail(f"{field}.from", f"unknown role '{shortened(turn['from'])}'{hint}")
    check_text(turn["value"], f"{field}.value", fail)
    return Said(ROLES[turn["from"]], turn["value"], f"{field}.value", f"{field}.from")


LAYOUT = Layout("llava", ("conversations",), fits, read)
