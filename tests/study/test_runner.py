"""The queue: what is run, what is left out, and the door."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from etils import epath

from mole_jax.study import runner
from mole_jax.study.config import plain
from tests import tiny
from tests.study.small import MOLE, study


def test_what_is_done_is_left_alone_and_parts_share_the_arms(materials, tmp_path):
    section = dataclasses.replace(study(materials).sections[0], adapters={"LoRA": plain(MOLE)})
    workdir, whole = epath.Path(tmp_path / "w"), study(materials, unit_steps=2, sections=(section,))
    runner.run(whole, workdir, part=1, parts=2)
    done = {path.parent.parent.parent.name for path in workdir.glob("runs/*/seed_*/eval/step_*.json")}
    assert done == {"mix_lora"}
    before = {path: path.stat().mtime for path in workdir.glob("runs/*/seed_*/eval/step_*.json")}
    gone, unsaved = list(before)[:2]
    gone.unlink()
    last = max((unsaved.parent.parent / "checkpoints").glob("[0-9]*"), key=lambda folder: int(folder.name))
    last.rmtree()  # as a kill leaves it that comes between the last evaluation and the last checkpoint
    runner.run(whole, workdir, part=1, parts=2)
    assert last.exists()
    after = {path: path.stat().mtime for path in workdir.glob("runs/*/seed_*/eval/step_*.json")}
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == [gone]


@pytest.mark.slow
def test_the_door_runs_and_reports(materials, tmp_path):
    config = tmp_path / "study.py"
    config.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT)!r})\n"
        "from pathlib import Path\nfrom tests.study import small\n"
        f"def get_study():\n    return small.study(Path({str(materials)!r}), unit_steps=2)\n"
    )
    line = [sys.executable, "-m", "mole_jax.study", "--config", str(config), "--workdir", str(tmp_path / "w")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": tiny.CHILD_FLAGS}

    def door(*more, **variables):
        return subprocess.run(
            [*line, *more], env=environment | variables, cwd=tiny.ROOT, capture_output=True, text=True, check=False
        )

    slices = {"MEGASCALE_SLICE_ID": "1", "MEGASCALE_NUM_SLICES": "4"}
    first = door(**slices)
    assert first.returncode == 0, first.stderr
    assert "1 of 1: alone / MoLE" in first.stderr
    assert "6 of 8 runs are missing" in (tmp_path / "w" / "report.md").read_text()
    wrong = door("--part", "4/4")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: --part 4/4")
