"""Batches prepared ahead, each with the data position after it."""

from __future__ import annotations

import queue
import threading
from typing import Any

from mole_jax.data.batch import Batch
from mole_jax.data.mixture import Mixture

AHEAD = 2
"""Batches that wait ready."""


class Prefetch:
    """Draws from a mixture in a thread of its own; errors come out where the batch would have.

    Each batch comes with the state to resume from once it has been used, so that what was drawn ahead is
    never taken for seen.
    """

    def __init__(self, mixture: Mixture):
        self._mixture = mixture
        self._ready: queue.Queue = queue.Queue(maxsize=AHEAD)
        self._first: tuple[Batch, dict[str, Any]] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True, name="prefetch")
        self._thread.start()

    def _fill(self) -> None:
        while not self._stop.is_set():
            try:
                item: Any = (next(self._mixture), self._mixture.get_state())
            except BaseException as error:  # handed to the reader, whatever it is
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        """Returns a batch and the data position after it."""
        if self._first is not None:
            item, self._first = self._first, None
            return item
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def first(self) -> Batch:
        """Returns the next batch and leaves it in its place."""
        self._first = next(self)
        return self._first[0]

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._mixture.close()
