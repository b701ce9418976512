"""What a run shows: a view on a terminal, plain lines elsewhere, nothing that breaks the terminal."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from mole_jax.training.progress import Progress, describe


def metrics(step: int) -> dict:
    return {"loss": 1 / step, "loss/general": np.float32(0.5), "tokens_per_second": 1000 * step}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A stream that is a terminal of 80 columns."""
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def test_description_is_short_and_leaves_out_absent_domains():
    line = describe({"loss": 1.23456, "loss/biomedical": 2.0, "loss/document": None, "tokens_per_second": 12345.6})
    assert line == "loss 1.235 (biomedic 2.00) 12,346 tok/s"
    assert describe({}) == ""


@pytest.mark.parametrize(("every", "lines"), [(0.0, 3), (1000.0, 2)])
def test_plain_lines_come_every_so_often_and_at_the_end(every, lines):
    stream = io.StringIO()
    progress = Progress(3, every_seconds=every, stream=stream)
    for step in (1, 2, 3):
        progress.update(step, metrics(step))
    progress.close()
    shown = stream.getvalue().splitlines()
    assert len(shown) == lines
    assert shown[-1] == "step 3/3  loss 0.333 (general 0.50) 3,000 tok/s"


def test_of_several_processes_one_speaks():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(3, stream=stream, show=False)
    progress.update(3, metrics(3))
    progress.say("hello")
    progress.close()
    assert stream.getvalue() == ""


def test_the_view_has_all_and_leaves_the_terminal_in_order(terminal):
    use = {f"router/use/general/expert{expert}": share for expert, share in enumerate((0.6, 0.38, 0.02))}
    speed = {"step_seconds": 1.0, "mfu": 0.41, "data_wait_fraction": 0.03, "memory_gib": 12.34}
    with Progress(10, start=4, stream=terminal) as progress:
        assert "the first step is being compiled" in terminal.getvalue()
        progress.update(5, {**metrics(5), **speed, **use, "loss/[b]other": 1.5})
        progress.update(6, {**metrics(6), **speed, **use, "step_seconds": 3.0})
        progress.say("hello")
    shown = terminal.getvalue()
    for words in ("4/10", "6/10", "loss 0.167", "5,750 tok/s", "MFU 41.0%", "data wait 3%", "memory 12.3 GiB"):
        assert words in shown, words
    assert "[b]other" in shown, "kept from the step before, and no markup"
    assert "0: 60%" in shown
    assert "1: 38%" in shown
    assert "2: 2%" not in shown, "too narrow"
    assert shown.index("\x1b[?25l") < shown.rindex("\x1b[?25h"), "the cursor is back"
    assert "hello\n" in shown


@pytest.mark.parametrize("asked", [{"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_plain_text_gets_it(terminal, monkeypatch, asked):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with Progress(3, stream=terminal) as progress:
        progress.update(3, metrics(3))
        progress.say("hello")
    assert terminal.getvalue() == "step 3/3  loss 0.333 (general 0.50) 3,000 tok/s\nhello\n"


def test_lines_of_other_runs_come_above_the_view(terminal, monkeypatch):
    """Of runs that train together one has the view; what the others say goes through it."""
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(3) as first:
        other = Progress(3, show_steps=False, prefix="seed 1: ")
        other.update(1, metrics(1))
        other.say("hello")
        first.update(1, metrics(1))
    assert "seed 1: hello" in terminal.getvalue()
    assert terminal.getvalue().count("1/3") == 1
