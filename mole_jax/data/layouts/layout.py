"""What a layout is: which fields of a record hold its turns and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mole_jax.data.containers.json_file import kind
from mole_jax.data.conversation import Role
from mole_jax.errors import UserError


class Fail(Protocol):
    """Returns the error for a `field` of the record that is being read; the problem says what to do too."""

    def __call__(self, field: str, problem: str) -> UserError: ...


@dataclasses.dataclass(frozen=True)
class Said:
    """A turn as the record has it, before the conversation is checked (`mole_jax.data.records.parse_record`)."""

    role: Role
    text: str
    field: str
    """Where the text stands, for messages."""
    role_field: str
    """Where it stands who speaks."""
    supervised: bool = True
    """Of an answer: the record does not say that it is context alone."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a layout finds in a record."""

    turns: tuple[Said, ...]
    images: tuple[str | bytes, ...]
    """Paths, `data:` URLs or encoded bytes, in the order of their `<image>`."""
    image_field: str
    """Where the images stand, for messages."""
    first: bool = False
    """Images of which the text marks no place stand first in the first turn of the user. Off: they are an error."""


def check_text(text: str, field: str, fail: Fail) -> None:
    """Raises ``fail(field, problem)`` where `text` holds half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is the lone surrogate \\u{ord(text[error.start]):04x}, half a character"
        raise fail(field, f"{problem}; replace it or take the record out") from None


def images(value: Any, field: str, fail: Fail) -> tuple[str | bytes, ...]:
    """Returns the images of a field that holds none (null), one or a list of them, each as `image` takes it."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(image(one, f"{field}[{i}]", fail) for i, one in enumerate(value))
    return (image(value, field, fail),)


def image(value: Any, field: str, fail: Fail) -> str | bytes:
    """Returns one image: a path, a `data:` URL, base64 text, encoded bytes, or a mapping of `bytes` and `path`.

    Hugging Face's datasets store such mappings; one of the two may be null. Base64 becomes a `data:` URL.
    """
    if isinstance(value, Mapping):
        if not {"bytes", "path"} & value.keys():
            raise fail(field, "expected a path, found an object without bytes and path; write the path itself")
        content, path = value.get("bytes"), value.get("path")
        if content is None and path is None:
            raise fail(field, "both its bytes and its path are null; fill one in or take the record out")
        value = path if content is None else content
    if not isinstance(value, str | bytes):
        raise fail(field, f"expected a path, found {kind(value)}")
    if not value:
        raise fail(field, "the path is empty; leave the field out for a record without image")
    if isinstance(value, bytes):
        return value
    check_text(value, field, fail)
    return base64_url(value) if len(value) > _LONGEST_NAME and value.startswith(_BASE64_STARTS) else value


def base64_url(text: str) -> str:
    """Returns base64 text as a `data:` URL, which one it is already stays."""
    return text if text.startswith("data:") else f"data:;base64,{text}"


def answers(record: Mapping[str, Any], fail: Fail) -> tuple[str, ...] | None:
    """Returns the references of a record with `answers`: a list of texts, or of objects with an `answer` (VQAv2)."""
    if "answers" not in record:
        return None
    found = record["answers"]
    several = found if isinstance(found, list | tuple) else ()
    given = [one.get("answer") if isinstance(one, Mapping) else one for one in several]
    texts = tuple(text for text in given if isinstance(text, str))
    if not texts or len(texts) < len(given):
        raise fail(
            "answers",
            "expected a list of texts, or of objects with an answer, and at least one; fill it in, or leave it out "
            "to take the last turn",
        )
    for text in texts:
        check_text(text, "answers", fail)
    return texts


_LONGEST_NAME = 255
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""How JPEG, PNG, GIF and WebP begin in base64."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How records of one kind are read; can be pickled.

    Each file of `mole_jax.data.layouts` makes one, and `mole_jax.data.layouts.table` lists them.
    """

    name: str
    """As `layout` of a domain names it."""
    keys: tuple[str, ...]
    """Fields that each of its records has, under the first of their names; for messages."""
    fits: Callable[[Mapping[str, Any]], bool]
    """Whether the keys of a record are those of this layout."""
    read: Callable[[Mapping[str, Any], Fail], Parts]
    """What a record says. Raises what `Fail` makes, for a field that is missing or of another type."""
    references: Callable[[Mapping[str, Any], Fail], tuple[str, ...] | None] = answers
    """All right answers of a held-out record that names several; None: the last turn is the only one."""
