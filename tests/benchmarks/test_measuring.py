"""Timing in turn: who is called when, and what the ratios are."""

from __future__ import annotations

import pytest

from benchmarks.measuring import alternately, least, machine, speedup


def test_candidates_run_in_turn_after_an_uncounted_call():
    calls: list[str] = []
    seconds = alternately({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_speedup_is_of_calls_side_by_side():
    # The machine slowed down threefold in the last round: the ratio of medians would be 1.5.
    seconds = {"ours": [1.0, 2.0, 9.0], "theirs": [2.0, 3.0, 18.0]}
    middle, low, high = speedup(seconds, "ours", "theirs")
    assert middle == 2.0
    assert low == pytest.approx(1.75)
    assert high == 2.0
    assert least(seconds, "theirs") == 2.0
    assert speedup({"ours": [1.0], "theirs": [3.0]}, "ours", "theirs") == (3.0, 3.0, 3.0)


def test_a_machine_is_described_without_its_name():
    import socket

    found = machine(["jax"])
    assert found["cores"] > 0  # pyright: ignore[reportOperatorIssue]
    assert found["versions"]["jax"]  # pyright: ignore[reportIndexIssue]
    assert socket.gethostname() not in str(found)
