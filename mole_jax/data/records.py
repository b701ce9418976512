"""Random access to raw records on disk, and their checked reading as `Example`.

A JSON or JSONL file is read through once to note where each record lies; after that a record is read
from disk when it is asked for. So a worker process gets byte offsets, not a gigabyte of records.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mole_jax.config import DomainConfig
from mole_jax.data.conversation import IMAGE, Example, Turn, image_count
from mole_jax.data.tfds_records import TFDS, TfdsRecords
from mole_jax.errors import UserError, nearest

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class FileRecords(Sequence):
    """The records of a LLaVA JSON or JSONL file, by index, read lazily; can be pickled.

    `records[i]` is the decoded JSON value. It raises `UserError` where the record is not JSON, which
    for a JSONL file is found only then.
    """

    def __init__(self, path: str | pathlib.Path):
        """Reads the file through once; raises `UserError` if it is missing, empty or no list of records."""
        self.path = pathlib.Path(path)
        self.file = str(path)
        """Name of the file, for messages."""
        if not self.path.is_file():
            raise UserError(f"{self.file}: no such file; check the domain's path")
        text = _read_text(self.path)
        start = text.lstrip()[:1]
        if not start:
            raise UserError(f"{self.file}: the file is empty; expected a JSON list or one JSON object a line")
        self._spans = _array_spans(text, self.file) if start == "[" else _line_spans(text)
        self._size = self.path.stat().st_size
        if len(self._spans) == 0:
            raise UserError(f"{self.file}: the list has no records; give a file with some")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        start, end = (int(value) for value in self._spans[index])
        try:
            # Opened every time: cheap beside decoding, and safe with threads and in worker processes.
            handle = os.open(self.path, os.O_RDONLY)
            try:
                changed = os.fstat(handle).st_size != self._size
                content = os.pread(handle, end - start, start)
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read any more ({error.strerror}); put it back") from None
        if changed:
            raise UserError(f"{self.file}: the file has changed since it was opened; start again")
        try:
            return json.loads(content)
        except ValueError as error:
            raise UserError(f"{self.file}: record {index} is not JSON ({error}); correct that line") from None


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
    return None if path.startswith(TFDS) else str(pathlib.Path(path).parent)


def parse_record(raw: Any, *, file: str, index: int, domain: str) -> Example:
    """Checks a raw LLaVA record and returns it as an `Example`.

    `image` may be missing, a path, or a list of paths. A leading turn of the assistant is left out, as
    LLaVA does. Without `id` the index is the id.

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
        raise UserError(f"{where}: expected an object with id, image and conversations, found {_kind(raw)}")
    identity = raw.get("id", index)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise fail("id", f"expected text or a number, found {_kind(identity)}")
    where += f" (id '{identity}')"
    if "conversations" not in raw:
        raise fail("conversations", f"missing{nearest('conversations', map(str, raw)) or '; add the list of turns'}")
    conversations = raw["conversations"]
    if not isinstance(conversations, list):
        raise fail("conversations", f"expected a list of turns, found {_kind(conversations)}")
    turns = [_turn(turn, f"conversations[{i}]", fail) for i, turn in enumerate(conversations)]
    first = 1 if turns and turns[0].role == "assistant" else 0
    for i, turn in enumerate(turns[first:], start=first):
        expected = "user" if (i - first) % 2 == 0 else "assistant"
        if turn.role != expected:
            raise fail(f"conversations[{i}].from", f"two turns of one side follow each other ({turn.role}); join them")
    last = len(turns) - 1
    if len(turns) - first < 2:
        raise fail("conversations", "needs a question and an answer; add them or take the record out")
    if turns[last].role == "user":
        raise fail(f"conversations[{last}].from", "the last turn is the human's, so it has no answer; add one")
    for i, turn in enumerate(turns[first:], start=first):
        if not turn.text.strip():
            raise fail(f"conversations[{i}].value", "the text is empty; fill it in or take the record out")
    images = _images(raw.get("image"), fail)
    marks = image_count(turns[first:])
    if marks != len(images):
        raise fail(
            "image",
            f"{len(images)} image(s) but {marks} {IMAGE} in the text; write one {IMAGE} in a human turn for each image",
        )
    if any(IMAGE in turn.text for turn in turns[first:] if turn.role == "assistant"):
        raise fail("conversations", f"{IMAGE} stands in an answer; move it into the human turn before")
    return Example(str(identity), domain, tuple(turns[first:]), images)


def _turn(turn: Any, field: str, fail) -> Turn:
    if not isinstance(turn, Mapping):
        raise fail(field, f"expected an object with from and value, found {_kind(turn)}")
    for key in ("from", "value"):
        if key not in turn:
            raise fail(f"{field}.{key}", "missing; a turn is an object with from and value")
        if not isinstance(turn[key], str):
            raise fail(f"{field}.{key}", f"expected text, found {_kind(turn[key])}")
    if turn["from"] not in ROLES:
        hint = nearest(turn["from"], ROLES) or f", expected one of {', '.join(ROLES)}"
        raise fail(f"{field}.from", f"unknown role '{turn['from']}'{hint}")
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
            raise fail(field, f"expected a path, found {_kind(one)}")
        if not one:
            raise fail(field, "the path is empty; leave the field out for a record without image")
    return tuple(several)


def _read_text(path: pathlib.Path) -> str:
    try:
        # Universal newlines would shift the byte offsets, so the bytes are decoded as they are.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _array_spans(text: str, file: str) -> Int[np.ndarray, "N 2"]:
    """Returns the (start, end) bytes of each element of a JSON array."""
    decoder = json.JSONDecoder()
    white: Any = re.compile(r"[ \t\n\r]*").match
    spans: list[tuple[int, int]] = []
    position, byte = 0, 0

    def advance(to: int) -> int:
        nonlocal position, byte
        byte += len(text[position:to].encode())
        position = to
        return byte

    try:
        cursor = white(text, text.index("[") + 1).end()
        while text[cursor : cursor + 1] != "]":
            if spans:
                if text[cursor : cursor + 1] != ",":
                    raise json.JSONDecodeError("expected ',' or ']'", text, cursor)
                cursor = white(text, cursor + 1).end()
            start = advance(cursor)
            _, cursor = decoder.raw_decode(text, cursor)
            spans.append((start, advance(cursor)))
            cursor = white(text, cursor).end()
        if text[white(text, cursor + 1).end() :]:
            raise json.JSONDecodeError("more text after the list", text, cursor + 1)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: after record {len(spans) - 1}: not JSON ({error}); correct the file") from None
    return np.asarray(spans, np.int64).reshape(-1, 2)


def _line_spans(text: str) -> Int[np.ndarray, "N 2"]:
    """Returns the (start, end) bytes of each line that is not blank."""
    spans: list[tuple[int, int]] = []
    byte = 0
    for line in text.split("\n"):
        size = len(line.encode())
        if line.strip():
            spans.append((byte, byte + size))
        byte += size + 1
    return np.asarray(spans, np.int64).reshape(-1, 2)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a truth value"}.get(
        type(value), f"a {type(value).__name__}"
    )
