"""What users' files hold can neither act on a terminal nor pass for a line of ours."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_jax import terminal
from mole_jax.training.progress import Progress

HOSTILE = "a\nerror: all is lost \x1b[2K\x9b8m\x07\r\u202egnp.exe\ud800\u2028"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_text_becomes_one_line_that_can_be_encoded(text):
    shown = terminal.escaped(text)
    shown.encode()
    assert len(shown.splitlines()) <= 1
    assert not set(shown) & set(map(chr, [*range(32), *range(127, 160)]))


@given(st.text())
def test_no_line_of_a_block_but_the_first_begins_at_the_margin(text):
    assert all(line.startswith("    ") for line in terminal.block(text).split("\n")[1:])


def test_ordinary_text_of_any_script_stays():
    text = "Größe: 漢字 👩‍👩‍👧 می‌خواهم"
    assert terminal.escaped(text) == text


def test_a_long_value_is_cut_with_its_length():
    assert terminal.shortened("x" * 5000, 3) == "xxx… (5,000 characters)"
    assert terminal.shortened("abc", 3) == "abc"


def test_colour_is_for_terminals_only(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.warning("x", Terminal()) == "\x1b[33mx\x1b[0m"
    assert terminal.warning("x", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.warning("x", Terminal()) == "x"


def test_an_error_is_one_line_whatever_it_quotes():
    program = f"from mole_jax.errors import *\ndef main(): raise UserError({HOSTILE!r})\nrun_door(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.decode().count("\n") == 1
    assert done.stderr.startswith(b"error: a\\nerror: all is lost \\x1b[2K")
    assert b"\x1b" not in done.stderr


def test_too_little_memory_of_a_device_is_one_line():
    """What jax raises here by allocating 16 TB is what it raises on any device."""
    program = "from mole_jax.errors import *\nimport jax.numpy as jnp\nrun_door(lambda: jnp.zeros((10**12, 4)))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: Out of memory allocating 16000000000000 bytes. The device has too little memory"
    )
    assert done.stderr.count("\n") == 1
    assert "train.accumulation" in done.stderr


def test_what_is_interrupted_at_the_keyboard_ends_without_a_traceback():
    program = "from mole_jax.errors import *\ndef main(): raise KeyboardInterrupt\nrun_door(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_a_run_says_is_escaped(stream):
    out = stream()
    progress = Progress(2, stream=out)
    progress.say(f"Records: {HOSTILE}")
    progress.close()
    assert "Records: a\\nerror: all is lost \\x1b[2K" in out.getvalue()
    assert "\u202e" not in out.getvalue()
