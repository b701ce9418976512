"""CSV and TSV: a header and rows, each found by its bytes, so that one can be read without the others."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from mole_jax.data.containers.json_file import decode
from mole_jax.errors import UserError
from mole_jax.files import PathLike, is_remote, path_of
from mole_jax.terminal import shortened

SUFFIXES = (".csv", ".tsv", ".tab")
MISSING = ("", "NA", "N/A", "#N/A", "NaN", "nan", "<NA>")
"""Cells without a value: the record has no such key."""
NESTED = ("conversations", "messages", "images", "choices", "options", "answers")
"""Columns whose cells may be lists, as JSON."""


class TableRecords(Sequence):
    """The rows of a CSV or TSV file, by index, as mappings from the header's names to text; can be pickled.

    The rules are those of Python's `csv`: a quoted cell may have line breaks, and quotes written twice. The separator
    is a tab in a TSV, else that of comma, semicolon and tab that the header has most of.
    """

    def __init__(self, path: PathLike, name: str | None = None):
        """Reads the file through once; `name` is what messages call it.

        Raises:
          UserError: it is empty, not UTF-8, or has a header and no rows, a name twice, or a second header.
        """
        self.path = path_of(path)
        self.file = name or str(path)
        # Cells with pictures in base64 are longer than the 128 kB that csv takes.
        csv.field_size_limit(sys.maxsize)
        self._digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                self._size = self._index(file)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({error.strerror or error}); check the path") from None
        self.sha256 = self._digest.hexdigest()
        del self._digest

    def _index(self, file: IO[bytes]) -> int:
        """Notes header, separator and where each row lies; returns the file's size."""
        lines = _Lines(file, self.file, self._digest)
        first = next(lines.peeked, "")
        self._separator = "\t" if self.path.suffix.lower() != ".csv" else max(",;\t", key=first.count)
        spans: list[tuple[int, int, int]] = []
        reader, header, start, line = csv.reader(lines, delimiter=self._separator, strict=True), None, lines.begin, 1
        try:
            for row in reader:
                if header is None and any(cell.strip() for cell in row):
                    header = self._header(row)
                elif row == header:
                    raise UserError(
                        f"{self.file}: line {line} repeats the header; take it out (are these two files in one?)"
                    )
                elif row:
                    spans.append((start, lines.end, line))
                start, line = lines.end, reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{self.file}: the row that begins in line {line} is not CSV ({error}); correct its quotes"
            ) from None
        if header is None:
            raise UserError(f"{self.file}: the file is empty; expected a header and rows")
        if not spans:
            raise UserError(f"{self.file}: has a header and no rows; give a file with some")
        self.columns = tuple(header)
        """Names of the columns, in order; an empty one (of a written index) is left out of records."""
        self._rows = np.asarray(spans, np.int64)
        return lines.end

    def _header(self, row: list[str]) -> list[str]:
        twice = sorted({name for name in row if name and row.count(name) > 1})
        if twice:
            raise UserError(f"{self.file}: its header has '{shortened(twice[0])}' twice; rename one")
        if len(row) == 1:
            raise UserError(
                f"{self.file}: its header '{shortened(row[0], 40)}' is one column; expected several, separated by "
                "comma, semicolon or tab"
            )
        return row

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        start, end, _ = (int(value) for value in self._rows[index])
        try:
            with self.path.open("rb") as file:
                if not is_remote(self.path) and os.fstat(file.fileno()).st_size != self._size:
                    raise UserError(f"{self.file}: the file has changed since it was opened; start again")
                file.seek(start)
                content = file.read(end - start)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read any more ({error.strerror}); put it back") from None
        return self._record(content, index)

    def _record(self, content: bytes, index: int) -> dict[str, Any]:
        csv.field_size_limit(sys.maxsize)  # again: this may be another process
        text = io.StringIO(content.decode(), newline="")
        cells = next(csv.reader(text, delimiter=self._separator, strict=True))
        if len(cells) != len(self.columns):
            raise UserError(
                f"{self.file}: record {index} (line {self._rows[index, 2]}) has {len(cells)} cells and the header "
                f"{len(self.columns)}; correct that row"
            )
        given = zip(self.columns, cells, strict=True)
        return {name: _value(name, cell) for name, cell in given if name and cell not in MISSING}

    def values(self) -> Iterator[Any]:
        """Yields all records in order, faster than by index; None for one with too few or too many cells."""
        with self.path.open("rb") as file:
            for index, (start, end, _) in enumerate(self._rows.tolist()):
                file.seek(start)
                try:
                    yield self._record(file.read(end - start), index)
                except UserError:
                    yield None

    def without_pictures(self) -> Iterator[Any]:
        """Yields what `values` does."""
        return self.values()


class _Lines:
    """The lines of a file as text, with the byte where the last one ended; `csv` takes no line beyond its row."""

    def __init__(self, file: IO[bytes], name: str, digest: Any):
        self._file, self._name, self._digest = file, name, digest
        mark = file.read(3)
        self.begin = 3 if mark == b"\xef\xbb\xbf" else 0
        file.seek(0)
        head = file.readline()
        self.end = self.begin
        digest.update(head[: self.begin])
        file.seek(self.begin)
        self.peeked = iter([head[self.begin :].decode("utf-8", "replace")])

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self._digest.update(line)
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                what = "; in UTF-16?" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
                raise UserError(
                    f"{self._name}: byte {self.end + error.start} is not UTF-8{what}; save the file as UTF-8"
                ) from None
            self.end += len(line)
            yield text


def _value(name: str, cell: str) -> Any:
    if name in NESTED and cell[:1] in "[{":
        try:
            return decode(cell)
        except ValueError:
            return cell
    return cell
