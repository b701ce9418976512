"""The records of a LLaVA JSON or JSONL file, by index, read lazily by byte offsets; and what other files are told.

The file is read through once to note where each record lies. After that a record is read from disk when it is asked
for, so a worker process gets byte offsets, not a gigabyte of records.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from mole_jax.errors import UserError
from mole_jax.files import PathLike, is_remote
from mole_jax.terminal import shortened

_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"ARROW1", "an Arrow file; write its rows as JSONL or parquet"),
    (b"SQLite format 3", "an SQLite database; write its rows as JSONL or parquet"),
    (b"\x89HDF", "an HDF5 file; write its rows as JSONL or parquet"),
    (codecs.BOM_UTF16_LE, "in UTF-16; save the file as UTF-8"),
    (codecs.BOM_UTF16_BE, "in UTF-16; save the file as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer and not the data; fetch them with git lfs pull"),
    (b"<", "a web page or XML; download the file itself"),
)
_LOOKED_AT = 10
"""Lines among which one must be JSON, where the first is not, for the file to be taken as JSONL."""
_INK = re.compile(r"\S")
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class FileRecords(Sequence):
    """The records of a LLaVA JSON or JSONL file, by index, read lazily; can be pickled.

    `records[i]` is the decoded JSON value. It raises `UserError` where the record is not JSON, which
    for a JSONL file is found only then.
    """

    def __init__(self, path: PathLike, name: str | None = None):
        """Reads the file through once; `name` is what messages call it, if not its path.

        Raises:
          UserError: it is missing, empty or no list of records; the message says what it is, in one line.
        """
        self.path = epath.Path(path) if is_remote(path) else pathlib.Path(path)
        self.file = name or str(path)
        """Name of the file, for messages."""
        content = _read(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        """Hash of the file's content."""
        self._size = len(content)
        for signature, kind in _SIGNATURES:
            if content.startswith(signature):
                raise UserError(f"{self.file}: is {kind}; expected JSON or JSONL")
        # Windows tools write a byte-order mark before UTF-8.
        begin = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
        try:
            # Universal newlines would shift the byte offsets, so the bytes are decoded as they are.
            text = str(memoryview(content)[begin:], "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file}: byte {begin + error.start} is not UTF-8; save the file as UTF-8") from None
        del content
        self._spans = begin + self._find(text)

    def _find(self, text: str) -> Int[np.ndarray, "N 2"]:
        """Returns the (start, end) bytes of each record of `text`."""
        if (found := _INK.search(text)) is None:
            raise UserError(f"{self.file}: the file is empty; expected a JSON list or one JSON object a line")
        if (start := found[0]) == "[":
            spans = _array_spans(text, self.file)
            if len(spans) == 0:
                raise UserError(f"{self.file}: the list has no records; give a file with some")
            if (first := _INK.search(text, found.end())) and first[0] != "{":
                raise UserError(
                    f"{self.file}: is a list whose first value is {_kind_of(first[0])}; expected a list of objects "
                    "with id, image and conversations"
                )
            return spans
        if start != "{":
            line = next(_lines(text, found.start()))
            commas = "a table? name it .csv or .tsv; " if any(mark in line for mark in ",;\t") else ""
            raise UserError(
                f"{self.file}: begins with '{shortened(line.strip(), 40)}', which is no JSON list or object ({commas}"
                "expected records as JSON or JSONL)"
            )
        _check_lines(text, found.start(), self.file)
        return _line_spans(text)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        start, end = (int(value) for value in self._spans[index])
        try:
            content = self._bytes(start, end)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read any more ({error.strerror}); put it back") from None
        try:
            return decode(content)
        except ValueError as error:
            raise UserError(f"{self.file}: record {index} is not JSON ({error}); correct that line") from None

    def _bytes(self, start: int, end: int) -> bytes:
        # Opened every time: cheap beside decoding, and safe with threads and in worker processes.
        if is_remote(self.path):
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            if os.fstat(handle).st_size != self._size:
                raise UserError(f"{self.file}: the file has changed since it was opened; start again")
            return os.pread(handle, end - start, start)
        finally:
            os.close(handle)

    def values(self) -> Iterator[Any]:
        """Yields all records in order, faster than by index; None for one that is not JSON."""
        with self.path.open("rb") as file:
            for start, end in self._spans.tolist():
                file.seek(start)
                try:
                    yield decode(file.read(end - start))
                except ValueError:
                    yield None

    def without_pictures(self) -> Iterator[Any]:
        """Yields what `values` does."""
        return self.values()


def decode(content: str | bytes) -> Any:
    """Returns the JSON value of `content`; raises `ValueError` with a reason whatever is wrong with it."""
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested deeper than can be read, which is some thousand levels") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except ValueError:
        # The only other refusal of json: Python turns no longer text into an integer.
        raise ValueError(f"it has a whole number of over {sys.get_int_max_str_digits():,} digits") from None


def kind(value: Any) -> str:
    """Returns what a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _kind_of(start: str) -> str:
    """Returns what a JSON value is that begins with `start`."""
    return {"[": "a list", '"': "text", "t": "a truth value", "f": "a truth value", "n": "null"}.get(start, "a number")


def _read(path: epath.Path | pathlib.Path) -> bytes:
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the domain's path")
        return path.read_bytes()
    except OSError as error:
        shown = shortened(str(path))
        raise UserError(f"{shown}: cannot be read ({error.strerror}); check the path and its permissions") from None


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
                if text[cursor : cursor + 1] == "]":
                    raise json.JSONDecodeError("a comma stands before the closing ']'", text, cursor)
            start = advance(cursor)
            try:
                _, cursor = decoder.raw_decode(text, cursor)
            except json.JSONDecodeError:
                raise
            except (ValueError, RecursionError):
                # Well formed, but refused by `decode` too: the problem of that record, not of the file.
                cursor = _end_of(text, cursor)
            spans.append((start, advance(cursor)))
            cursor = white(text, cursor).end()
        if rest := text[white(text, cursor + 1).end() :]:
            more = "a second list follows, join them" if rest[0] == "[" else "more text after the list"
            raise json.JSONDecodeError(more, text, cursor + 1)
    except json.JSONDecodeError as error:
        where = f"after record {len(spans) - 1}: " if spans else ""
        raise UserError(f"{file}: {where}not JSON ({error}); correct the file") from None
    return np.asarray(spans, np.int64).reshape(-1, 2)


def _end_of(text: str, start: int) -> int:
    """Returns where the value at `start` ends, by its brackets alone."""
    if text[start] not in "[{":
        found = re.compile(r"[^\s,\]}]+").match(text, start)
        return found.end() if found else start
    depth = 0
    for found in _TOKENS.finditer(text, start):
        if found[0] in "[{":
            depth += 1
        elif found[0] in "]}":
            depth -= 1
            if not depth:
                return found.end()
    raise json.JSONDecodeError("the value has no end", text, start)


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


def _check_lines(text: str, begin: int, file: str) -> None:
    """Looks at the first value, which begins an object at `begin`: is the file one object a line?

    Raises:
      UserError: it is not, told in one line instead of a complaint about each line.
    """
    lines = (line for line in _lines(text, begin) if line.strip())
    first = next(lines)
    try:
        value = decode(first)
    except ValueError as error:
        problem = error
    else:
        if isinstance(value, Mapping) and next(lines, None) is None and (listed := _listed(value)):
            raise UserError(f"{file}: is one object and no list of records{listed}")
        return
    try:
        value, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        if any(map(_is_object, itertools.islice(lines, _LOOKED_AT))):
            return  # one bad line, which is the problem of its record
        raise UserError(
            f"{file}: is neither a JSON list nor one JSON object a line (the first line: {problem}); correct the file"
        ) from None
    rest = _INK.search(text, end)
    if rest and rest[0] == ",":
        raise UserError(f"{file}: has commas between its objects but no list around them; put it between [ and ]")
    if "\n" in text[begin:end]:
        if rest:
            raise UserError(
                f"{file}: has objects of several lines each; write one a line, or put them between [ and ] with commas"
            )
        remedy = _listed(value) or "; put it between [ and ] if it is a record"
        raise UserError(f"{file}: is one object of several lines and no list of records{remedy}")


def _lines(text: str, start: int) -> Iterator[str]:
    """Yields the lines of `text` from `start` on, without making all of them."""
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def _is_object(line: str) -> bool:
    try:
        return isinstance(decode(line), Mapping)
    except ValueError:
        return False


def _listed(value: Mapping[str, Any]) -> str:
    """Returns a hint on the field of `value` that holds the records, if `value` is no record itself."""
    if "conversations" in value:
        return ""
    for name, field in value.items():
        if isinstance(field, list) and field and isinstance(field[0], Mapping) and "conversations" in field[0]:
            return f"; its field '{shortened(name, 40)}' has {len(field):,} of them: save that list alone"
    return ""
