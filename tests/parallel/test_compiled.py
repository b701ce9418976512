"""Compiled programs are found again by the next process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import argparse, os, resource
from mole_jax.parallel import compiled
parser = argparse.ArgumentParser()
compiled.add_flag(parser)
compiled.keep(parser.parse_args())
LIMIT = int(os.environ.get("LIMIT", 0))  # bytes that a file can have
import jax, jax.numpy as jnp
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
if LIMIT:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8))).block_until_ready()
count = lambda what: found.count(f"/jax/compilation_cache/cache_{what}")
print("hits", count("hits"), "misses", count("misses"))
"""


def run(home: Path, *flags: str, **environment: str) -> tuple[int, int, str]:
    """Returns how many programs were found and how many compiled, and what was warned of."""
    own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags],
        env=inherited | {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    hits, misses = map(int, re.findall(r"\d+", done.stdout))
    return hits, misses, done.stderr


def test_a_second_start_compiles_nothing(tmp_path):
    hits, misses, _ = run(tmp_path)
    assert hits == 0
    assert misses > 0  # small as they are
    assert run(tmp_path)[:2] == (misses, 0)
    assert list((tmp_path / ".cache" / "mole_jax" / "compiled").rglob("*-cache"))


def test_the_variable_of_jax_names_the_folder_and_the_flag_turns_it_off(tmp_path):
    given = tmp_path / "given"
    run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(given))
    assert list(given.rglob("*-cache"))
    assert not (tmp_path / ".cache").exists()
    assert run(tmp_path, "--no-compilation-cache", JAX_COMPILATION_CACHE_DIR=str(given))[0] == 0


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, place):
    (tmp_path / "file").touch()
    folder = tmp_path / place.replace("below a file", "file/below")
    hits, _, warned = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(folder))
    assert hits == 0
    assert warned.count("\n") == 1
    assert warned.startswith(f"warning: {folder}: ")
    assert "compiled programs are not kept" in warned


def test_a_folder_that_is_full_later_is_one_warning(tmp_path):
    given = tmp_path / "given"
    warned = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(given), LIMIT="100")[2]
    assert warned.count("\n") == 1
    assert warned.startswith(f"warning: {given}: OSError: [Errno 27] File too large; what fails there is compiled anew")
    # What was cut off is not taken for a program.
    hits, _, warned = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(given))
    assert hits == 0
    assert warned.count("\n") == 1
    assert warned.startswith(f"warning: {given}: ")
