"""What every tracker can do, and the thread that keeps its troubles away from training.

Others have such a protocol. google-metrax's `LoggingBackend` takes one number a call and no picture or text. clu's
`MetricWriter` takes eight kinds of summary, none of them a table, and its `AsyncWriter` raises a tracker's failure in
the training loop. Here a tracker takes what a run has to show, numbers, pictures and answers; one that fails is told of
and left.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

MOST_WAITING = 1000
"""Entries that wait for a tracker; one that is further behind is given up."""
PATIENCE = 60.0
"""Seconds that a tracker has at the end of a run for what still waits."""


class Tracker(Protocol):
    """Something that shows a run. Its functions may raise any `Exception`."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Shows numbers of a step by their names; more of the same step may follow."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Shows a PNG."""

    def answers(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Shows a table of texts, each row with the same columns."""

    def flush(self) -> None:
        """Makes what was shown visible to readers."""

    def close(self) -> None:
        """Flushes and lets go of files and connections."""


class Apart:
    """A tracker with a thread of its own: no call waits for it, or raises what it raises.

    One that fails, or is over `MOST_WAITING` entries or `PATIENCE` seconds behind, is told of in one line and gets
    nothing more.
    """

    def __init__(self, name: str, opened: Callable[[], Tracker], say: Callable[[str], None]):
        """`opened` is called in the thread. `say` takes a line for the screen, from any thread."""
        self._name, self._say, self._given_up = name, say, False
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, args=(opened,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._put(lambda tracker: tracker.numbers(step, values))

    def picture(self, step: int, name: str, png: bytes) -> None:
        self._put(lambda tracker: tracker.picture(step, name, png))

    def answers(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        self._put(lambda tracker: tracker.answers(step, name, rows))

    def flush(self) -> None:
        self._put(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Waits until the tracker has everything and is closed, `PATIENCE` seconds at most."""
        self._put(None)
        if not self._given_up:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._give_up(f"is not done {PATIENCE:.0f} s after the last step")

    def _put(self, entry: Callable[[Tracker], None] | None) -> None:
        if self._given_up:
            return
        try:
            self._waiting.put_nowait(entry)
        except queue.Full:
            self._give_up(f"is {MOST_WAITING} entries behind")

    def _work(self, opened: Callable[[], Tracker]) -> None:
        try:
            tracker = opened()
            while (entry := self._waiting.get()) is not None and not self._given_up:
                entry(tracker)
            tracker.close()
        except Exception as error:
            self._give_up(" ".join(str(error).split()).rstrip(".") or type(error).__name__)

    def _give_up(self, why: str) -> None:
        if not self._given_up:
            self._given_up = True
            self._say(f"{self._name}: {why}; it is shown nothing more of this run, which goes on")
