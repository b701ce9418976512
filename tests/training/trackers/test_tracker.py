"""A tracker that fails, hangs or falls behind never reaches the loop: one line, and the run goes on."""

from __future__ import annotations

import threading
import time

import pytest

from mole_jax.training.trackers import tracker
from mole_jax.training.trackers.tracker import Apart


class Slow:
    """A tracker that waits for `go` at each number, and keeps what it was given."""

    def __init__(self, error: Exception | None = None):
        self.go, self.error, self.got = threading.Event(), error, []

    def numbers(self, step, values):
        self.go.wait(30)
        if self.error is not None:
            raise self.error
        self.got.append((step, values))

    def flush(self):
        self.got.append("flush")

    def close(self):
        self.got.append("close")


def test_everything_comes_in_order_before_close_returns():
    slow, said = Slow(), []
    apart = Apart("slow", lambda: slow, said.append)
    for step in (1, 2):
        apart.numbers(step, {"loss": 1.0})
    apart.flush()
    assert slow.got == [], "no call waits"
    slow.go.set()
    apart.close()
    assert slow.got == [(1, {"loss": 1.0}), (2, {"loss": 1.0}), "flush", "close"]
    assert said == []


def test_one_that_fails_is_told_once_and_gets_nothing_more():
    slow, said = Slow(OSError("no route\nto host.")), []
    apart = Apart("slow", lambda: slow, said.append)
    slow.go.set()
    for step in range(5):
        apart.numbers(step, {})
    apart.close()
    assert said == ["slow: no route to host; it is shown nothing more of this run, which goes on"]
    assert slow.got == []


def test_one_that_cannot_be_opened_is_told():
    def opened():
        raise PermissionError("no API key is known")

    said = []
    apart = Apart("service", opened, said.append)
    apart.numbers(1, {})
    apart.close()
    assert said == ["service: no API key is known; it is shown nothing more of this run, which goes on"]


@pytest.mark.parametrize("what", ["behind", "close"])
def test_one_that_hangs_is_left(monkeypatch, what):
    monkeypatch.setattr(tracker, "MOST_WAITING", 3)
    monkeypatch.setattr(tracker, "PATIENCE", 0.2)
    slow, said = Slow(), []
    apart = Apart("slow", lambda: slow, said.append)
    began = time.monotonic()
    for step in range(9 if what == "behind" else 2):
        apart.numbers(step, {})
    apart.close()
    assert time.monotonic() - began < 5
    why = "is 3 entries behind" if what == "behind" else "is not done 0 s after the last step"
    assert said == [f"slow: {why}; it is shown nothing more of this run, which goes on"]
    slow.go.set()
