"""The records of a domain under the names of its layout, and those of them that the domain keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mole_jax.data.containers.container import Records
from mole_jax.errors import UserError, nearest
from mole_jax.terminal import shortened

_LOOKED_AT = 16


class SelectedRecords(Sequence):
    """Records of which fields are renamed and some are left out; can be pickled.

    Attributes:
      file: as of the records.
      sha256: of the records, the names and what is kept.
      numbers: where each record stands in its file; None: all are kept.
      columns: ours -> theirs.
    """

    def __init__(self, records: Records, columns: Sequence[str], where: Sequence[str]):
        """Reads all records once if `where` is not empty.

        Args:
          records: of a container.
          columns: pairs ours=theirs.
          where: pairs field=value, all of which a record must have; a record that cannot be read is kept, to be told.

        Raises:
          UserError: no record has such a field or value; the message lacks the domain's name.
        """
        self._records, self.file = records, records.file
        self.columns = dict(_pair(one) for one in columns)
        self.numbers: Int[np.ndarray, " N"] | None = None
        _check_columns(records, self.columns)
        self.sha256 = records.sha256
        if where:
            self.numbers = _numbers(records, dict(_pair(one) for one in where))
        if columns or where:
            chosen = json.dumps([records.sha256, sorted(columns), sorted(where)])
            self.sha256 = hashlib.sha256(chosen.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records) if self.numbers is None else len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return self._renamed(self._records[self.number(index)])

    def number(self, index: int) -> int:
        """Returns where record `index` stands in its file, from 0."""
        return index if self.numbers is None else int(self.numbers[index])

    def values(self) -> Iterator[Any]:
        """Yields all that are kept in order, faster than by index; None for one that cannot be read."""
        kept = None if self.numbers is None else iter(self.numbers.tolist())
        following = None if kept is None else next(kept, None)
        for number, record in enumerate(self._records.values()):
            if kept is not None:
                if number != following:
                    continue
                following = next(kept, None)
            yield self._renamed(record)

    def without_pictures(self) -> Iterator[Any]:
        """Yields what `values` does."""
        return self.values()

    def _renamed(self, record: Any) -> Any:
        if not self.columns or not isinstance(record, Mapping):
            return record
        theirs = set(self.columns.values())
        others = {name: value for name, value in record.items() if name not in theirs}
        return others | {ours: record[name] for ours, name in self.columns.items() if name in record}


def _pair(text: str) -> tuple[str, str]:
    first, _, second = text.partition("=")
    return first, second


def _check_columns(records: Records, columns: Mapping[str, str]) -> None:
    """Raises `UserError` if none of the first records has a field that `columns` names."""
    if not columns:
        return
    found: set[str] = set()
    for _, record in zip(range(_LOOKED_AT), records.values(), strict=False):
        if isinstance(record, Mapping):
            found |= set(map(str, record))
    for ours, theirs in columns.items():
        if theirs not in found:
            raise UserError(
                f"{records.file}: has no field '{shortened(theirs)}', which columns names for "
                f"{shortened(ours)}{nearest(theirs, found) or _listed(found)}"
            )


def _numbers(records: Records, wanted: Mapping[str, str]) -> Int[np.ndarray, " N"]:
    kept, names, values = [], set(), {field: set() for field in wanted}
    for number, record in enumerate(records.values()):
        if not isinstance(record, Mapping):
            kept.append(number)
            continue
        names |= set(map(str, record))
        found = {field: _as_written(record[field]) for field in wanted if field in record}
        for field, value in found.items():
            if len(values[field]) < _LOOKED_AT:
                values[field].add(value)
        if found == dict(wanted):
            kept.append(number)
    for field in wanted:
        if field not in names:
            raise UserError(
                f"{records.file}: has no field '{shortened(field)}', which where names"
                f"{nearest(field, names) or _listed(names)}"
            )
    if not kept:
        asked = ", ".join(f"{field}={value}" for field, value in wanted.items())
        there = "; ".join(f"{field} has {', '.join(sorted(map(shortened, some)))}" for field, some in values.items())
        raise UserError(f"{records.file}: where {shortened(asked)} keeps none of its records; {there}")
    return np.asarray(kept, np.int64)


def _as_written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _listed(names: set[str]) -> str:
    return f"; it has {', '.join(shortened(name, 40) for name in sorted(names)[:_LOOKED_AT])}"
