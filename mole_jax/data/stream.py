"""The shards of a mixture: their elements, read by one pool for all of them, and their packing into rows."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from mole_jax.data.load import REASONS, TOO_LARGE
from mole_jax.data.mixing import deal
from mole_jax.data.packing import OpenRow, Packer
from mole_jax.errors import UserError

# Elements read ahead: enough to hide the reading, few enough to stay small (0.3 MB each at 336 px).
READ_AHEAD = 32


@dataclasses.dataclass
class Ledger:
    """What was skipped: each record once, however often it is drawn or replayed.

    Attributes:
      on_bad, on_too_long: "error" or "skip", as in `DataConfig`.
      sizes: name and number of usable records of each domain.
      entries: (domain, record) to (reason, "domain/id: message").
    """

    on_bad: str
    on_too_long: str
    sizes: tuple[tuple[str, int], ...]
    entries: dict[tuple[int, int], tuple[str, str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._skipped = collections.Counter(domain for domain, _ in self.entries)

    def skips(self, reason: str) -> bool:
        """Returns whether a record with this problem is skipped; False without a problem."""
        return bool(reason) and (self.on_too_long if reason in TOO_LARGE else self.on_bad) == "skip"

    def add(self, entries: Mapping[tuple[int, int], tuple[str, str]]) -> None:
        """Enters records that were found unusable elsewhere; raises `UserError` if nothing of a domain is left."""
        for key, entry in sorted(entries.items()):
            self._enter(key, entry)

    def accept(self, element: dict[str, Any]) -> bool:
        """Returns whether the element is usable; enters it if not.

        Raises:
          UserError: the policy for its problem is "error", or nothing of its domain is left.
        """
        if not element["reason"]:
            return True
        if not self.skips(element["reason"]):
            field = "on_too_long" if element["reason"] in TOO_LARGE else "on_bad_record"
            raise UserError(f"{element['message']} (or set data.{field} to skip)")
        entry = element["reason"], f"{element['record_id']}: {element['message']}"
        self._enter((element["domain"], element["record"]), entry)
        return False

    def _enter(self, key: tuple[int, int], entry: tuple[str, str]) -> None:
        domain = key[0]
        if key not in self.entries:
            self.entries[key] = entry
            self._skipped[domain] += 1
        name, size = self.sizes[domain]
        if self._skipped[domain] == size:
            raise UserError(f"domain {name}: all {size} records were skipped; the last one: {entry[1]}")

    def by_reason(self) -> dict[str, list[str]]:
        """Returns the skipped records, "domain/id: message", under each reason that occurred."""
        ordered = [self.entries[key] for key in sorted(self.entries)]
        grouped = {reason: [text for why, text in ordered if why == reason] for reason in REASONS}
        return {reason: texts for reason, texts in grouped.items() if texts}

    def get_state(self) -> list[list]:
        return [[*key, *entry] for key, entry in sorted(self.entries.items())]

    def set_state(self, state: list[list]) -> None:
        self.entries = {(domain, record): (reason, text) for domain, record, reason, text in state}
        self.__post_init__()


class Reader:
    """Reads the elements of some shards ahead, round by round, whichever shard wants its next.

    Shards want theirs at nearly the same pace, so little waits. The place is the number taken of each shard,
    nothing else, so it does not depend on `workers`.
    """

    def __init__(self, elements: grain.MapDataset, shards: Sequence[int], of: int, *, seed: int, workers: int):
        """Reads what is dealt to `shards`, out of `of` shards, of `elements` in the order of the draws."""
        self._elements, self._shards, self._of, self._seed, self._workers = elements, tuple(shards), of, seed, workers
        self._iterator: grain.DatasetIterator | None = None
        self.seek(dict.fromkeys(shards, 0))

    def seek(self, taken: Mapping[int, int]) -> None:
        """Goes to where `taken` elements of each shard were taken; stops what reads ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        self.taken = dict(taken)
        self._waiting = {shard: collections.deque() for shard in self._shards}
        self._order = _Order(self._elements, self._shards, self._of, self._seed, self.taken)
        self._read = 0

    def close(self) -> None:
        """Stops what reads ahead; `take` starts it again."""
        self.seek(self.taken)

    def take(self, shard: int) -> tuple[int, dict[str, Any]]:
        """Returns the next element of a shard, and its number there."""
        if self._iterator is None:
            self._iterator = _open(self._order, self._workers)
        while not self._waiting[shard]:
            self._waiting[self._order.place(self._read)[0]].append(_next(self._iterator))
            self._read += 1
        number = self.taken[shard]
        self.taken[shard] += 1
        return number, self._waiting[shard].popleft()

    def again(self, shard: int, number: int) -> dict[str, Any]:
        """Returns element `number` of a shard once more."""
        return self._elements[deal(number, self._seed, shard, self._of)]  # type: ignore[return-value]


class _Order(grain.MapDataset):
    """What some shards get, in rounds; first what is left of rounds that some shard has already had."""

    def __init__(self, elements: grain.MapDataset, shards: Sequence[int], of: int, seed: int, taken: Mapping[int, int]):
        super().__init__([elements])
        self._elements, self._shards, self._of, self._seed = elements, shards, of, seed
        self._begin = max(taken.values())
        rest = range(min(taken.values()), self._begin)
        self._behind = [(shard, number) for number in rest for shard in shards if taken[shard] <= number]

    def place(self, index: int) -> tuple[int, int]:
        """Returns (shard, number in it)."""
        if index < len(self._behind):
            return self._behind[index]
        rounds, turn = divmod(index - len(self._behind), len(self._shards))
        return self._shards[turn], self._begin + rounds

    def __len__(self) -> int:
        return len(self._elements) // self._of

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        shard, number = self.place(index)
        return self._elements[deal(number, self._seed, shard, self._of)]


def _open(elements: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    threads = 2 if workers else max(2, min(8, os.cpu_count() or 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads if workers else READ_AHEAD)
    dataset = elements.to_iter_dataset(options)
    if workers:
        mark_flags_parsed()
        # What frees the memory of a killed worker would say so under the one line that matters.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(2, READ_AHEAD // workers)),
            worker_init_fn=_start_worker,
        )
    return dataset.__iter__()


class Stream:
    """The packed rows of one shard, until `limit` elements of it are taken and all its rows are given out."""

    def __init__(self, reader: Reader, shard: int, ledger: Ledger, packer: Packer, limit: int | None):
        self._reader, self._shard, self._ledger, self._limit = reader, shard, ledger, limit
        self.packer = packer

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> OpenRow:
        while self._limit is None or self._reader.taken[self._shard] < self._limit:
            number, element = self._reader.take(self._shard)
            if self._ledger.accept(element) and (given := self.packer.add(number, element)):
                return given
        if (given := self.packer.give()) is None:
            raise StopIteration
        return given

    def get_state(self) -> dict[str, Any]:
        """Returns the place as plain JSON values; what stands in open rows is named, not held."""
        rows = [[row.opened, [number for number, _ in row.examples]] for row in self.packer.open]
        return {"taken": self._reader.taken[self._shard], "given": self.packer.given, "open": rows}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a place that `get_state` gave, but for the reader, which seeks for all shards at once."""
        self.packer.given, self.packer.open = state["given"], []
        for opened, numbers in state["open"]:
            row = OpenRow(opened)
            for number in numbers:
                element = self._reader.again(self._shard, number)
                if self._ledger.accept(element):
                    row.add(number, element)
            if row.examples:
                self.packer.open.append(row)


def mark_flags_parsed() -> None:
    """Lets grain read its absl flags in a program that does not use absl's `app.run`."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _next(iterator: grain.DatasetIterator) -> dict[str, Any]:
    try:
        return next(iterator)
    except RuntimeError as error:
        # grain has no exception of its own for this.
        if found := re.search(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error)):
            raise UserError(
                f"a data worker ended with exit code {found[1]} (-9: killed, most often for want of memory); the same "
                "command resumes, with a lower data.workers it needs less memory"
            ) from None
        raise


def _start_worker(worker_index: int, worker_count: int) -> None:
    del worker_index, worker_count
    mark_flags_parsed()
    end_with_parent()


def end_with_parent() -> None:
    """Watches, from now on and in a thread, for this process's parent to be killed, and ends it then."""
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed; with its last worker gone, the shared memory is freed too."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()  # returns at once where it was killed before this worker came here
        os._exit(1)
