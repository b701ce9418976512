"""What a run computed, to be compared with that of another bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mole_jax.files import absolute
from mole_jax.weights.run import latest_step, stored_leaves

TIMED = ("tokens_per_second", "step_seconds", "data_wait_fraction", "mfu", "memory_gib")


def numbers(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def check_same(workdir: Path, whole: Path) -> None:
    """Metrics, final parameters, evaluation and data report of both runs are the same."""
    assert numbers(workdir) == numbers(whole)
    step = latest_step(absolute(str(whole)))
    assert step is not None
    assert latest_step(absolute(str(workdir))) == step
    ours, theirs = (stored_leaves(absolute(str(folder)), step) for folder in (workdir, whole))
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), err_msg=name)
    for name in ("data_report.json", "trainable.json", "config.json", f"eval/step_{step:08d}.json"):
        assert (workdir / name).exists() == (whole / name).exists(), name
        if (whole / name).exists():
            assert json.loads((workdir / name).read_text()) == json.loads((whole / name).read_text()), name
