"""Parquet: a file, or shards of one set, read by row groups."""

from __future__ import annotations

import collections
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mole_jax.data.containers.shards import content_hash
from mole_jax.errors import UserError
from mole_jax.files import PathLike, is_remote, path_of
from mole_jax.terminal import escaped, shortened

_KEPT = 2
"""Row groups that a process keeps: one record cannot be read without the others of its group."""
_LARGE = 64 * 2**20
"""Bytes of a row group above which a line says what random access will cost."""
_BATCH = 64


class ParquetRecords(Sequence):
    """The rows of parquet files, by index; can be pickled, and then holds none of them.

    A record has every column; nested lists and structs are lists and mappings, null is None.
    """

    def __init__(self, files: Sequence[PathLike], name: str):
        """Reads the footers of `files`, in order; `name` is what messages call them.

        Raises:
          UserError: one is no whole parquet file, has other columns than the first, or there are no rows.
        """
        self.file = name
        self._files = [str(file) for file in files]
        self._reset()
        groups: list[tuple[int, int, int]] = []
        largest, columns = 0, None
        for shard, file in enumerate(self._files):
            opened = self._open(shard)
            names = opened.schema_arrow.names
            columns = names if columns is None else columns
            if set(names) != set(columns):
                odd = shortened(", ".join(sorted(set(names) ^ set(columns))))
                raise UserError(
                    f"{file}: its columns are not those of {self._files[0]} ({odd} in one alone); name the files of "
                    "one set"
                )
            for group in range(opened.metadata.num_row_groups):
                one = opened.metadata.row_group(group)
                groups.append((shard, group, one.num_rows))
                largest = max(largest, one.total_byte_size)
        self._groups = np.asarray(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self):
            raise UserError(f"{name}: has no rows; write it again")
        self.sha256 = content_hash(files)
        if largest > _LARGE:
            print(
                escaped(
                    f"{name}: has row groups of up to {largest / 2**20:,.0f} MiB, and a record is read with its whole "
                    "group; `python -m mole_jax.data convert` makes shards that are read record by record"
                ),
                file=sys.stderr,
            )

    def _reset(self) -> None:
        self._opened: dict[int, Any] = {}
        self._tables: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _open(self, shard: int) -> Any:
        """Returns an opened file; of the last one alone the handle is kept."""
        if shard not in self._opened:
            self._opened = {shard: _opened(self._files[shard])}
        return self._opened[shard]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        position = index - int(self._ends[number] - self._groups[number, 2])
        return self._table(number).slice(position, 1).to_pylist()[0]

    def _table(self, number: int) -> Any:
        # A parquet reader is for one thread, and two that want the same group shall not both read it.
        with self._lock:
            if number not in self._tables:
                shard, group, _ = (int(value) for value in self._groups[number])
                try:
                    table = self._open(shard).read_row_group(group, use_threads=False)
                except UserError:
                    raise
                except Exception as error:  # of many types, by what is damaged
                    raise UserError(
                        f"{self._files[shard]}: row group {group} cannot be read ({_reason(error)}); the file is "
                        "damaged or has changed, fetch it again"
                    ) from None
                self._tables[number] = table
                if len(self._tables) > _KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(number)
            return self._tables[number]

    def values(self) -> Iterator[Any]:
        """Yields all records in order; None for those of a row group that cannot be read."""
        return self._all(pictures=True)

    def without_pictures(self) -> Iterator[Any]:
        """Yields all records in order, without reading their columns of bytes."""
        return self._all(pictures=False)

    def _all(self, *, pictures: bool) -> Iterator[Any]:
        for shard, file in enumerate(self._files):
            opened = _opened(file)
            columns = None if pictures else [one.path for one in _leaves(opened.schema) if not _is_bytes(one)]
            for group, rows in self._groups[self._groups[:, 0] == shard, 1:].tolist():
                given = 0
                try:
                    for batch in opened.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False):
                        for value in batch.to_pylist():
                            given += 1
                            yield value
                except Exception:
                    yield from [None] * (rows - given)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("_opened", "_tables", "_lock")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reset()


def _opened(file: str) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path_of(file).open("rb") if is_remote(file) else file)
    except Exception as error:
        raise UserError(
            f"{file}: cannot be read as parquet ({_reason(error)}); it is cut short or another file, fetch it again"
        ) from None


def _leaves(schema: Any) -> Iterator[Any]:
    return (schema.column(i) for i in range(len(schema)))


def _is_bytes(column: Any) -> bool:
    return column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
