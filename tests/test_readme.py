"""Every command of the README runs as written, on shortened runs; nothing in it is left untested."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests import tiny
from tests.tiny import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.strip().splitlines()
]
DOORS = [line for line in COMMANDS if line.startswith(".venv/bin/python -m mole_jax.")]
LAUNCHES = [line for line in COMMANDS if line.startswith("launch/")]
SHORT = ["--train.steps", "2", "--evaluation.tasks.0.limit", "4"]
SHORT_THREE = [*SHORT, "--evaluation.tasks.1.limit", "4", "--evaluation.tasks.2.limit", "4"]


def run(line, cwd=ROOT):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": tiny.CHILD_FLAGS}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_every_command_is_known_here_or_in_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    others = [line for line in COMMANDS if line not in DOORS and line not in LAUNCHES]
    assert others == ["make quickstart", "make test"]
    assert all(line in ci for line in others)
    assert len(DOORS) == 7
    assert LAUNCHES


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_lines(line):
    done = run(shlex.split(line))
    assert done.returncode == 0, done.stderr
    assert "mole_jax.train" in done.stdout


def test_the_doors_of_the_readme_in_their_order(tmp_path):
    """Writes the README's configs/mine.py, then runs its commands with workdirs in `tmp_path` and two steps a run."""
    if not (ROOT / "runs" / "quickstart" / "mole" / "checkpoints").is_dir():
        pytest.skip("needs the quickstart's data and run: `make quickstart` first")
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(snippet)
    for line in DOORS:
        words = shlex.split(line.replace("configs/mine.py", str(tmp_path / "mine.py")))
        for path in (
            "runs/mine",
            "runs/quickstart/lora_hf",
            "runs/quickstart/mole_hf",
            "runs/quickstart/lora",
            "runs/quickstart/scores",
        ):
            words = [str(tmp_path / path) if word == path else word for word in words]
        door = words[2].removeprefix("mole_jax.")
        if door in ("train", "evaluate"):
            words += SHORT_THREE if "configs/quickstart.py" in words else SHORT
        done = run([sys.executable, *words[1:]])
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        expected = {
            "data": "⟦",
            "train": "report:",
            "convert": "arrays",
            "evaluate": "exact_match",
            "generate": "",  # what it says is the model's; that it says something is checked below
        }[door]
        assert expected in done.stdout, line
        assert done.stdout.strip(), line
