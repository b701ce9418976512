"""Elements in the order of the draws, from this process or from workers, and their packing into rows."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from mole_jax.data.batch import Row
from mole_jax.data.load import REASONS, TOO_LONG, TOO_MANY_IMAGES
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

    def accept(self, element: dict[str, Any]) -> bool:
        """Returns whether the element is usable; enters it if not.

        Raises:
          UserError: the policy for its problem is "error", or nothing of its domain is left.
        """
        if not element["reason"]:
            return True
        too_long = element["reason"] in (TOO_LONG, TOO_MANY_IMAGES)
        field, policy = ("on_too_long", self.on_too_long) if too_long else ("on_bad_record", self.on_bad)
        if policy == "error":
            raise UserError(f"{element['message']} (or set data.{field} to skip)")
        domain = element["domain"]
        if (key := (domain, element["record"])) not in self.entries:
            self.entries[key] = (element["reason"], f"{element['record_id']}: {element['message']}")
            self._skipped[domain] += 1
        name, size = self.sizes[domain]
        if self._skipped[domain] == size:
            raise UserError(f"domain {name}: all {size} records were skipped; the last one: {element['message']}")
        return False

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


class ExampleStream(grain.IterDataset):
    """The usable elements of a sequence of elements.

    Its state is the number of elements taken, nothing else, so it does not depend on `workers`: to go
    on from there the readers are started anew on the rest of the sequence.
    """

    def __init__(self, elements: grain.MapDataset, accept: Callable[[dict[str, Any]], bool], workers: int):
        super().__init__()
        self._elements, self._accept, self._workers = elements, accept, workers

    def __iter__(self) -> grain.DatasetIterator:
        return _ExampleIterator(self._open, self._accept)

    def _open(self, start: int) -> grain.DatasetIterator:
        rest = self._elements.slice(slice(start, None)) if start else self._elements
        threads = 2 if self._workers else max(2, min(8, os.cpu_count() or 1))
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=2 * threads if self._workers else READ_AHEAD
        )
        dataset = rest.to_iter_dataset(options)
        if self._workers:
            mark_flags_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=max(2, READ_AHEAD // self._workers)
                ),
                worker_init_fn=_start_worker,
            )
        return dataset.__iter__()


class _ExampleIterator(grain.DatasetIterator):
    def __init__(self, open_at: Callable[[int], grain.DatasetIterator], accept: Callable[[dict[str, Any]], bool]):
        super().__init__()
        self._open_at, self._accept = open_at, accept
        self._taken = 0
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, Any]:
        if self._reader is None:
            self._reader = self._open_at(self._taken)
        while True:
            element = next(self._reader)
            self._taken += 1
            if self._accept(element):
                return _features(element)

    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._taken = int(state["taken"])

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def packed(
    stream: ExampleStream, *, sequence_length: int, images_per_row: int, examples_per_row: int, bins: int, seed: int
) -> grain.DatasetIterator:
    """Returns an iterator over packed rows; `row_of` turns its elements into `Row`.

    Examples are put whole into the fullest of `bins` open rows that has place for their tokens, their
    images and one more example. When one fits nowhere, the open rows are given out in an order drawn
    from the seed, and others are opened. At the end of a finite stream the open rows are given out too.
    """
    lengths = {
        "tokens": sequence_length,
        "supervised": sequence_length,
        "domains": sequence_length,
        "images": images_per_row,
        "record_ids": examples_per_row,
    }
    dataset = grain.experimental.BestFitPackIterDataset(
        stream, length_struct=lengths, num_packing_bins=bins, seed=seed, max_sequences_per_bin=examples_per_row
    )
    return dataset.__iter__()


def row_of(element: dict[str, Any], pad_id: int) -> Row:
    """Returns a packed element as a `Row`, with `pad_id` at padding."""
    segments = element["tokens_segment_ids"]
    return Row(
        tokens=np.where(segments > 0, element["tokens"], pad_id),
        supervised=element["supervised"],
        positions=element["tokens_positions"],
        segment_ids=segments,
        domain_ids=element["domains"],
        images=element["images"],
        record_ids=tuple(element["record_ids"][: segments.max()]),
    )


def mark_flags_parsed() -> None:
    """Lets grain read its absl flags in a program that does not use absl's `app.run`."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(worker_index: int, worker_count: int) -> None:
    del worker_index, worker_count
    mark_flags_parsed()


def _features(element: dict[str, Any]) -> dict[str, np.ndarray]:
    tokens = element["tokens"]
    return {
        "tokens": tokens,
        "supervised": element["supervised"],
        "domains": np.full(len(tokens), element["domain"], np.int32),
        "images": element["images"],
        "record_ids": np.array([element["record_id"]], dtype=object),
    }
