"""The raw records of a domain, and their checked reading as `Example`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mole_jax.config import DomainConfig
from mole_jax.data.conversation import Example, Turn, image_count
from mole_jax.data.json_file import FileRecords, kind
from mole_jax.data.tfds_records import TFDS, TfdsRecords
from mole_jax.errors import UserError, nearest
from mole_jax.files import path_of
from mole_jax.prompts import IMAGE
from mole_jax.terminal import shortened

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


Records = FileRecords | TfdsRecords


def read_records(domain: DomainConfig) -> Records:
    """Opens the records of `domain`: a LLaVA JSON or JSONL file, or `tfds:NAME:SPLIT`.

    Raises:
      UserError: there is nothing to read; the message names the domain and the file.
    """
    try:
        return TfdsRecords(domain.path) if domain.path.startswith(TFDS) else FileRecords(domain.path)
    except UserError as error:
        raise UserError(f"domain {domain.name}: {error}") from None


def image_root(path: str, root: str | None) -> str | None:
    """Returns the folder of a file's images: `root`, or the folder of `path` where that is a file."""
    if root is not None:
        return root
    return None if path.startswith(TFDS) else str(path_of(path).parent)


def parse_record(raw: Any, *, file: str, index: int, domain: str) -> Example:
    """Checks a raw LLaVA record and returns it as an `Example`.

    `image` may be missing, a path, or a list of paths. A system turn may stand first. A leading turn of the assistant
    is left out, as LLaVA does. Without `id`, or where it is null, the index is the id.

    Args:
      raw: the decoded record.
      file, index: where it stands (counted from 0), for messages.
      domain: name of its domain.

    Raises:
      UserError: a field is missing or of another type, an unknown role, turns that do not alternate, no
        answer, or `<image>` and images that do not match. It names the file, the record and the field.
    """
    where = f"{file}: record {index}"

    def fail(field: str, problem: str) -> UserError:
        return UserError(f"{where}, field {field}: {problem}")

    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected an object with id, image and conversations, found {kind(raw)}")
    identity = raw.get("id")
    if identity is None or (isinstance(identity, float) and math.isnan(identity)):
        identity = index  # pandas writes null or NaN for an id that is not there
    if isinstance(identity, bool) or not isinstance(identity, str | int | float):
        raise fail("id", f"expected text or a number, found {kind(identity)}")
    identity = str(identity)
    check_text(identity, "id", fail)
    where += f" (id '{shortened(identity)}')"
    if "conversations" not in raw:
        raise fail("conversations", f"missing; {_remedy(raw)}")
    conversations = raw["conversations"]
    if not isinstance(conversations, list):
        raise fail("conversations", f"expected a list of turns, found {kind(conversations)}")
    turns = [_turn(turn, f"conversations[{i}]", fail) for i, turn in enumerate(conversations)]
    numbered = list(enumerate(turns))
    system = numbered[:1] if turns and turns[0].role == "system" else []
    rest = numbered[len(system) :]
    if rest and rest[0][1].role == "assistant":
        del rest[0]
    for place, (i, turn) in enumerate(rest):
        if turn.role == "system":
            raise fail(f"conversations[{i}].from", "a system turn stands after others; put it first")
        if turn.role != ("assistant" if place % 2 else "user"):
            raise fail(f"conversations[{i}].from", f"two turns of one side follow each other ({turn.role}); join them")
    if len(rest) < 2:
        raise fail("conversations", "needs a question and an answer; add them or take the record out")
    if turns[-1].role == "user":
        raise fail(
            f"conversations[{len(turns) - 1}].from", "the last turn is the human's, so it has no answer; add one"
        )
    for i, turn in system + rest:
        if not turn.text.strip():
            raise fail(f"conversations[{i}].value", "the text is empty; fill it in or take the record out")
    kept = tuple(turn for _, turn in system + rest)
    images = _images(raw.get("image"), fail)
    marks = image_count(kept)
    if marks != len(images):
        raise fail(
            "image",
            f"{len(images)} image(s) but {marks} {IMAGE} in the text; write one {IMAGE} in a human turn for each image",
        )
    if any(IMAGE in turn.text for turn in kept if turn.role == "assistant"):
        raise fail("conversations", f"{IMAGE} stands in an answer; move it into the human turn before")
    return Example(identity, domain, kept, images)


def check_text(text: str, field: str, fail) -> None:
    """Raises ``fail(field, problem)`` where `text` holds half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is the lone surrogate \\u{ord(text[error.start]):04x}, half a character"
        raise fail(field, f"{problem}; replace it or take the record out") from None


def _remedy(raw: Mapping[str, Any]) -> str:
    """Returns what to do about a record without conversations."""
    if "messages" in raw:
        return "rename messages to conversations, and role and content in it to from and value"
    # Only of names that are nearly right: any other would be a guess.
    found = [name for name in map(str, raw) if nearest(name, ["conversations"], cutoff=0.8)]
    return f"rename '{shortened(found[0])}' to conversations" if found else "add the list of turns"


def _turn(turn: Any, field: str, fail) -> Turn:
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
    return Turn(ROLES[turn["from"]], turn["value"])  # type: ignore[arg-type]


def _images(image: Any, fail) -> tuple[str | bytes, ...]:
    if image is None:
        return ()
    if isinstance(image, bytes):
        return (image,)
    several = list(image) if isinstance(image, list | tuple) else [image]
    for i, one in enumerate(several):
        field = f"image[{i}]" if isinstance(image, list | tuple) else "image"
        if not isinstance(one, str | bytes):
            raise fail(field, f"expected a path, found {kind(one)}")
        if not one:
            raise fail(field, "the path is empty; leave the field out for a record without image")
        if isinstance(one, str):
            check_text(one, field, fail)
    return tuple(several)
