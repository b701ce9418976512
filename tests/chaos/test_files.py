"""Every file of a run, spoilt: the next command recovers and says so, or stops with one line; no traceback, no gap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mole_jax.files import absolute
from mole_jax.weights.run import stored_leaves
from tests.chaos import doors, spoiling

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos_files")]

OF_TRAINING = (
    "config.json",
    "inputs.json",
    "trainable.json",
    "metrics.jsonl",
    "data_report.json",
    "eval/step_00000000.json",
    "eval/step_00000000.md",
    "eval/step_00000000/general.jsonl",
    "eval/step_00000006.json",
    "eval/expert_use.json",
    "plots/losses.png",
    "report.html",
    "tokenizer.model",
    ".lock",
    "tensorboard",
)
"""What no command but `train` and the report reads, and the tokenizer."""
CASES = [(name, way) for name in OF_TRAINING for way in spoiling.ways(name)]
TIMED = ("tokens_per_second", "step_seconds", "data_wait_fraction", "mfu")


def spoil(folder: Path, name: str, way: spoiling.Spoil) -> None:
    path = folder / name
    if name == "tensorboard":
        (path,) = path.iterdir()
    way(path)


def numbers(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def check_same(workdir: Path, whole: Path) -> None:
    """All that a run computes, bit by bit."""
    assert numbers(workdir) == numbers(whole)
    ours, theirs = (stored_leaves(absolute(folder), 6) for folder in (workdir, whole))
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), err_msg=name)
    for name in ("data_report.json", "trainable.json", "config.json", "eval/step_00000006.json"):
        assert json.loads((workdir / name).read_text()) == json.loads((whole / name).read_text()), name


@pytest.mark.parametrize(("name", "way"), CASES, ids=[f"{name}-{way.__name__}" for name, way in CASES])
def test_train_again(config, whole, stopped, name, way):
    spoil(stopped, name, way)
    done = doors.here("train", "--config", config, "--workdir", stopped)
    print(done.err)
    if done.status:
        assert name.split("/")[-1] in done.line
        return
    try:
        check_same(stopped, whole)
    except (AssertionError, OSError, ValueError) as error:
        pytest.fail(f"a gap: {error}; said: {done.err[-600:]}")
