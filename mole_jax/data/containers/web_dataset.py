"""WebDataset: tar files whose neighbouring members of one name are a record: ``0001.json``, ``0001.jpg``."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from mole_jax.data.containers.json_file import decode, kind
from mole_jax.data.containers.shards import content_hash
from mole_jax.errors import UserError
from mole_jax.files import PathLike, is_remote, path_of

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2")
TEXTS = ("txt", "text", "caption", "cls")
_NUMBERED = re.compile(rf"^\d+\.(?=({'|'.join(PICTURES)})$)")
"""What stands before the extension of each of several pictures: ``0001.0.jpg``."""
_TAKEN = ("json", *PICTURES, *TEXTS)
_BLOCK, _PADDING = tarfile.BLOCKSIZE, 20 * tarfile.BLOCKSIZE


class WebDatasetRecords(Sequence):
    """The samples of WebDataset tars, by index; can be pickled.

    A record has the fields of the sample's ``.json``; text members under their extension (a ``.cls`` as a number);
    ``image`` with the content of its picture, a list of several (under ``images``, where the JSON has that), unless
    the JSON holds a ``data:`` URL itself; and ``id``, the sample's name, where the JSON has none.
    """

    def __init__(self, files: Sequence[PathLike], name: str):
        """Reads the headers of `files` through once; `name` is what messages call them.

        Raises:
          UserError: one is no whole tar, is compressed, or has no samples.
        """
        self.file = name
        self._files = [str(file) for file in files]
        self._sizes: list[int] = []
        members: list[tuple[int, int, int, int]] = []  # shard, extension, first byte, size
        starts: list[int] = []
        keys: list[bytes] = []
        digest = hashlib.sha256()
        for shard, file in enumerate(self._files):
            last = None
            for key, extension, first, size in self._members(file):
                digest.update(f"{key}\0{extension}\0{size}\n".encode("utf-8", "surrogateescape"))
                if key != last:
                    starts.append(len(members))
                    keys.append(key.encode("utf-8", "surrogateescape"))
                    last = key
                members.append((shard, _TAKEN.index(extension), first, size))
            if last is None:
                raise UserError(
                    f"{file}: has no samples; expected members such as 0001.json and 0001.jpg, write the tar again"
                )
        # Arrays, as a list of a million tuples is a hundred megabytes in every worker.
        self._parts = np.asarray(members, np.int64)
        self._starts = np.asarray([*starts, len(members)], np.int64)
        self._key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        self._keys = b"".join(keys)
        digest.update(content_hash(files).encode())
        self.sha256 = digest.hexdigest()

    def _members(self, file: str) -> Iterator[tuple[str, str, int, int]]:
        """Yields name of the sample, extension, first byte and size of each member that is taken."""
        try:
            with path_of(file).open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                self._sizes.append(size)
                with tarfile.open(fileobj=stream, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                        folder, _, base = member.name.rpartition("/")
                        stem, _, extension = base.partition(".")
                        extension = _NUMBERED.sub("", extension.lower())
                        if member.isreg() and stem and extension in _TAKEN:
                            yield f"{folder}/{stem}" if folder else stem, extension, member.offset_data, member.size
                    end = tar.offset
                _check_end(stream, file, end, size)
        except tarfile.TarError as error:
            raise UserError(
                f"{file}: cannot be read as a tar ({error}); it is cut short or another file, fetch it again"
            ) from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error}); check the path") from None

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        parts = self._parts[self._starts[index] : self._starts[index + 1]].tolist()
        file = self._files[parts[0][0]]
        try:
            with path_of(file).open("rb") as stream:
                if not is_remote(file) and os.fstat(stream.fileno()).st_size != self._sizes[parts[0][0]]:
                    raise UserError(f"{file}: the file has changed since it was opened; start again")
                return self._record(stream, index, parts, pictures=True)
        except OSError as error:
            raise UserError(f"{file}: cannot be read any more ({error.strerror}); put it back") from None

    def _key(self, index: int) -> str:
        begin = int(self._key_ends[index - 1]) if index else 0
        return self._keys[begin : int(self._key_ends[index])].decode("utf-8", "surrogateescape")

    def _record(self, stream: IO[bytes], index: int, parts: list[list[int]], *, pictures: bool) -> dict[str, Any]:
        record: dict[str, Any] = {}
        shown: list[bytes] = []
        for _, extension, first, size in parts:
            name = _TAKEN[extension]
            if name in PICTURES and not pictures:
                shown.append(b"?")
                continue
            stream.seek(first)
            content = stream.read(size)
            if name in PICTURES:
                shown.append(content)
            elif name == "json":
                record = self._fields(content, index) | record
            else:
                record.setdefault(name, self._text(content, name, index))
        key = next((key for key in ("images", "image") if key in record), "image")
        if shown and not _is_embedded(record.get(key)):
            record[key] = shown[0] if len(shown) == 1 and key == "image" else shown
        return {"id": self._key(index)} | record

    def _fields(self, content: bytes, index: int) -> dict[str, Any]:
        where = f"{self.file}: record {index} ('{self._key(index)}')"
        try:
            fields = decode(content)
        except ValueError as error:
            raise UserError(f"{where}: its .json is not JSON ({error}); correct it") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: its .json is {kind(fields)}; expected an object with the record's fields")
        return fields

    def _text(self, content: bytes, name: str, index: int) -> str | int:
        where = f"{self.file}: record {index} ('{self._key(index)}')"
        try:
            text = content.decode()
            return int(text) if name == "cls" else text
        except ValueError:
            expected = "a whole number" if name == "cls" else "UTF-8"
            raise UserError(f"{where}: its .{name} is not {expected}; write the sample again") from None

    def values(self) -> Iterator[Any]:
        """Yields all records in order; None for one that cannot be read."""
        return self._all(pictures=True)

    def without_pictures(self) -> Iterator[Any]:
        """Yields all records in order, without reading their pictures."""
        return self._all(pictures=False)

    def _all(self, *, pictures: bool) -> Iterator[Any]:
        ends = np.searchsorted(self._parts[self._starts[:-1], 0], np.arange(len(self._files)), side="right")
        begin = 0
        for file, end in zip(self._files, ends.tolist(), strict=True):
            with path_of(file).open("rb") as stream:
                for index in range(begin, end):
                    parts = self._parts[self._starts[index] : self._starts[index + 1]].tolist()
                    try:
                        yield self._record(stream, index, parts, pictures=pictures)
                    except UserError:
                        yield None
            begin = end


def _check_end(stream: IO[bytes], file: str, end: int, size: int) -> None:
    """Looks for the zeros that close a tar: its reader takes a tar without them for a whole one."""
    stream.seek(end)
    closing = stream.read(_BLOCK)
    if len(closing) < _BLOCK or any(closing):
        raise UserError(f"{file}: ends early, after byte {end:,}; it was cut short or is damaged, fetch it again")
    if size - end > _PADDING and any(stream.read()):
        raise UserError(f"{file}: has another tar after its end (byte {end:,}); name each as a file of its own")


def _is_embedded(value: Any) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(one, str) and one.startswith("data:") for one in values)
