"""ArrayRecord: shards of records with their pictures inside, read one by one at any place; and their writer.

Each element is one record, packed by msgpack: a map with text keys, whose pictures are byte strings. Text that is
broken (half of a surrogate pair) is kept as it is, so that the record's reading can tell of it. Elements are not
grouped (``group_size:1``), so reading one reads nothing else.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgpack

from mole_jax.data.containers.container import in_order
from mole_jax.data.containers.shards import check_local, content_hash
from mole_jax.errors import UserError
from mole_jax.files import PathLike, whole_folder

NAME = "records-{:05d}-of-{:05d}.array_record"
_OPTIONS = "group_size:1,zstd:1"
# Of one record at a time; the default reads 16 MB ahead.
_READING = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecords(Sequence):
    """The records of ArrayRecord shards as `write` makes them, by index; can be pickled."""

    def __init__(self, files: Sequence[PathLike], name: str):
        """Opens the shards `files`, in order; `name` is what messages call them.

        Raises:
          UserError: one is in a bucket, is no ArrayRecord file or cut short, or there are no records.
        """
        check_local(name, "ArrayRecord")
        self.file = name
        self._files = [str(file) for file in files]
        self._readers: dict[int, Any] = {}
        self._ends = list(itertools.accumulate(self._reader(i).num_records() for i in range(len(files))))
        if not self._ends[-1]:
            raise UserError(f"{name}: has no records; write it again")
        self.sha256 = content_hash(files)

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader

            file = self._files[shard]
            try:
                # Two threads that come here at once each open one, and one of the two stays.
                reader = ArrayRecordReader(file, _READING, file_reader_buffer_size=32768)
                assert reader.ok()
            except Exception as error:  # of many types, by what is wrong
                raise UserError(
                    f"{file}: cannot be read as ArrayRecord ({_reason(error)}); it is cut short or another file, write "
                    "or copy it again"
                ) from None
            self._readers[shard] = reader
        return self._readers[shard]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        shard = bisect.bisect_right(self._ends, index)
        position = index - (self._ends[shard - 1] if shard else 0)
        reader = self._reader(shard)
        try:
            content = reader.read([position])[0]
        except Exception as error:
            raise UserError(
                f"{self._files[shard]}: record {position} cannot be read ({_reason(error)}); the file is damaged, "
                "write or copy it again"
            ) from None
        try:
            return msgpack.unpackb(content, unicode_errors="surrogatepass", strict_map_key=False)
        except Exception:
            raise UserError(
                f"{self._files[shard]}: record {position} is not as `data convert` writes it (msgpack); convert its "
                "source again"
            ) from None

    def values(self) -> Iterator[Any]:
        """Returns all records in order; None for one that cannot be read."""
        return in_order(self)

    def without_pictures(self) -> Iterator[Any]:
        """Yields nothing: the pictures of all records are inside."""
        return iter(())

    def __getstate__(self) -> dict:
        return {**vars(self), "_readers": {}}


def write(folder: PathLike, records: Iterable[dict[str, Any]], *, total: int, shards: int) -> None:
    """Writes records to ArrayRecord shards of equal size, whole or not at all.

    Args:
      folder: new or empty; the shards are `NAME` in it, records in order.
      records: of any layout; `image` or `images` is the content of an image file, or a list of such, or missing. Other
        fields are kept: of JSON's types and bytes.
      total: how many `records` yields.
      shards: how many files; no more than there are records.

    Raises:
      UserError: the folder has something in it or cannot be written, or a record cannot be packed.
    """
    shards = max(1, min(shards, total))
    records, given = iter(records), 0
    with whole_folder(folder) as inside:
        for shard in range(shards):
            count = total * (shard + 1) // shards - total * shard // shards
            own = itertools.islice(records, count)
            given += _write_shard(str(inside / NAME.format(shard, shards)), own, given)
        if given != total or next(records, None) is not None:
            raise ValueError(f"{total} records were announced, {'more' if given == total else given} came")


def _write_shard(path: str, records: Iterable[dict[str, Any]], first: int) -> int:
    """Writes one file; returns how many records it has."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, number = ArrayRecordWriter(path, _OPTIONS), 0
    try:
        for number, record in enumerate(records, 1):
            for name in ("image", "images"):
                images = record.get(name, [])
                if not all(isinstance(one, bytes) for one in (images if isinstance(images, list) else [images])):
                    raise TypeError(f"record {first + number - 1}: `{name}` must be the content of image files")
            writer.write(_packed(record, first + number - 1))
    finally:
        writer.close()
    return number


def _packed(record: Mapping[str, Any], index: int) -> bytes:
    try:
        return bytes(msgpack.packb(record, unicode_errors="surrogatepass") or b"")
    except (OverflowError, ValueError, TypeError) as error:
        raise UserError(f"record {index} cannot be written ({error}); correct it or take it out") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
