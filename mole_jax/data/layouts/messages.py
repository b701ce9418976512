"""Messages of `role` and `content`: OpenAI's chat format, and what TRL, ms-swift and LLaMA-Factory make of it.

Sources: OpenAI's guide to vision fine-tuning; TRL's dataset formats; ms-swift's Custom-dataset; LLaMA-Factory's
data/README.md (mllm_demo). `content` is text, or a list of parts: ``{type: text, text}``, ``{type: image}`` with its
image in it or in the record's `images`, ``{type: image_url, image_url: {url}}``. Parts are joined by line breaks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mole_jax.data.containers.json_file import kind
from mole_jax.data.conversation import Role
from mole_jax.data.layouts import llava
from mole_jax.data.layouts.fields import absent, as_text, images_of, system
from mole_jax.data.layouts.layout import Fail, Layout, Parts, Said, base64_url, image
from mole_jax.errors import nearest
from mole_jax.prompts import IMAGE
from mole_jax.terminal import shortened

ROLES: Mapping[str, Role] = {**llava.ROLES, "developer": "system"}
_TYPES = ("text", "image", "image_url")
_WITHIN = ("image", "url", "path", "base64")
"""Fields of an image part that may hold the image, as transformers' chat templates know them."""


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has messages."""
    return "messages" in record


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    return parts_of(record, ("messages",), fail)


def parts_of(record: Mapping[str, Any], fields: Sequence[str], fail: Fail) -> Parts:
    """Returns what lists of messages in some fields, one after the other, say; and the record's system prompt."""
    given, image_field = images_of(record, fail)
    marked = _Marked(given, image_field, fail)
    turns = tuple(turn for field in fields for turn in _turns(record, field, marked, fail))
    before = () if turns and turns[0].role == "system" else system(record, fail)
    return Parts(before + turns, marked.images(), image_field, first=True)


class _Marked:
    """The images in the order of their marks, of which those without content of their own are the record's."""

    def __init__(self, given: Sequence[str | bytes], field: str, fail: Fail):
        self._given, self._field, self._fail = given, field, fail
        self._next = itertools.count()
        self._used: set[int] = set()
        self._found: list[str | bytes] = []

    def add(self, content: str | bytes) -> None:
        self._found.append(content)

    def take(self, number: int | None, field: str) -> None:
        """Takes image `number` of the record, or the next."""
        number = next(self._next) if number is None else number
        if number >= len(self._given):
            raise self._fail(
                field, f"stands for image {number} of '{self._field}', which has {len(self._given)}; add it there"
            )
        self._used.add(number)
        self._found.append(self._given[number])

    def take_marks(self, text: str) -> None:
        """Takes an image for each mark in a text, as far as there are any; whether all fit is checked later."""
        for _ in range(text.count(IMAGE)):
            if (number := next(self._next)) < len(self._given):
                self._used.add(number)
                self._found.append(self._given[number])

    def images(self) -> tuple[str | bytes, ...]:
        return (*self._found, *(one for i, one in enumerate(self._given) if i not in self._used))


def _turns(record: Mapping[str, Any], field: str, marked: _Marked, fail: Fail) -> Iterator[Said]:
    if absent(messages := record.get(field)):
        raise fail(field, "missing; add the list of messages")
    if not isinstance(messages, list | tuple):
        raise fail(field, f"expected a list of messages, found {kind(messages)}")
    for i, message in enumerate(messages):
        yield _turn(message, f"{field}[{i}]", marked, fail)


def _turn(message: Any, field: str, marked: _Marked, fail: Fail) -> Said:
    if not isinstance(message, Mapping):
        raise fail(field, f"expected an object with role and content, found {kind(message)}")
    if not isinstance(message.get("role"), str):
        raise fail(f"{field}.role", f"expected text, found {kind(message.get('role'))}; add who speaks")
    if message["role"] not in ROLES:
        hint = nearest(message["role"], ROLES) or f", expected one of {', '.join(ROLES)}"
        raise fail(f"{field}.role", f"unknown role '{shortened(message['role'])}'{hint}")
    place = f"{field}.content"
    if absent(content := message.get("content")):
        raise fail(place, "missing; fill it in or take the record out")
    if isinstance(content, list | tuple):
        words = "\n".join(_part(part, f"{place}[{i}]", marked, fail) for i, part in enumerate(content))
    else:
        words = as_text(content, place, fail)
        marked.take_marks(words)
    role = ROLES[message["role"]]
    return Said(role, words, place, f"{field}.role", role != "assistant" or _supervised(message, field, fail))


def _supervised(message: Mapping[str, Any], field: str, fail: Fail) -> bool:
    """Returns whether an answer is trained on, by ms-swift's `loss` or OpenAI's `weight`, which are on where absent."""
    said = {name: message[name] for name in ("loss", "weight") if not absent(message.get(name))}
    for name, value in said.items():
        if value not in (0, 1):
            raise fail(f"{field}.{name}", f"is {shortened(str(value))}, an answer is trained on or not; write 0 or 1")
    return all(said.values())


def _part(part: Any, field: str, marked: _Marked, fail: Fail) -> str:
    if not isinstance(part, Mapping):
        raise fail(field, f"expected an object with type, found {kind(part)}")
    if part.get("type") not in _TYPES:
        found = shortened(str(part.get("type")))
        raise fail(f"{field}.type", f"is '{found}', expected one of {', '.join(_TYPES)}; take the part out")
    if part["type"] == "text":
        if absent(part.get("text")):
            raise fail(f"{field}.text", "missing; fill it in or take the part out")
        words = as_text(part["text"], f"{field}.text", fail)
        marked.take_marks(words)
        return words
    if part["type"] == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        marked.add(image(url, f"{field}.image_url", fail))
        return IMAGE
    name = next((name for name in _WITHIN if not absent(part.get(name))), None)
    if name is not None:
        content = part[name]
        if name == "base64" and isinstance(content, str):
            content = base64_url(content)
        marked.add(image(content, f"{field}.{name}", fail))
        return IMAGE
    number = part.get("index")
    if not (number is None or (isinstance(number, int) and not isinstance(number, bool) and number >= 0)):
        raise fail(f"{field}.index", "expected the number of an image, from 0; correct it or leave it out")
    marked.take(number, field)
    return IMAGE


LAYOUT = Layout("messages", ("messages",), fits, read)
