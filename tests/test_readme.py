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
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
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
    assert len(DOORS) == 10
    assert LAUNCHES


def short_study(folder):
    """Writes a study like configs/study.py with two seeds of one small arm, on the quickstart's data and base."""
    file = folder / "study.py"
    file.write_text(
        f"import dataclasses, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from configs import quickstart, study\n"
        "def get_study():\n"
        "    whole, run = study.get_study(), quickstart.get_config()\n"
        "    evaluation = dataclasses.replace(run.evaluation, generate=False, at_start=False)\n"
        "    tasks = tuple(dataclasses.replace(task, limit=4) for task in evaluation.tasks)\n"
        "    run = dataclasses.replace(\n"
        "        run,\n"
        "        train=dataclasses.replace(run.train, batch_rows=2, trainable=('adapters', 'router')),\n"
        "        evaluation=dataclasses.replace(evaluation, tasks=tasks, batch_size=4),\n"
        "    )\n"
        "    section = dataclasses.replace(whole.sections[0], mixtures={'general': {'general': 1.0}})\n"
        "    return dataclasses.replace(\n"
        "        whole, run=run, unit_steps=2, seeds=(0, 1), sections=(section,),\n"
        "        comparisons=(), curves=(), data=(), bases=(),\n"
        "    )\n"
    )
    return file


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_lines(line):
    done = run(shlex.split(line))
    assert done.returncode == 0, done.stderr
    assert "mole_jax.train" in done.stdout


def test_the_doors_of_the_readme_in_their_order(tmp_path):
    """Writes the README's configs/mine.py, then runs its commands with workdirs in `tmp_path` and two steps a run."""
    if not (ROOT / "runs" / "quickstart" / "mole" / "checkpoints").is_dir():
        pytest.skip("needs the quickstart's data and run: `make quickstart` first")
    snippet = next(one for one in SNIPPETS if "get_config" in one)
    (tmp_path / "mine.py").write_text(snippet)
    for line in DOORS:
        words = shlex.split(line.replace("configs/mine.py", str(tmp_path / "mine.py")))
        for path in (
            "runs/mine",
            "runs/quickstart/lora_hf",
            "runs/quickstart/lora_peft",
            "runs/quickstart/mole_hf",
            "runs/quickstart/lora",
            "runs/quickstart/scores",
            "runs/quickstart/routing",
            "runs/study/report",
        ):
            words = [str(tmp_path / path) if word == path else word for word in words]
        door = words[2].removeprefix("mole_jax.")
        if door == "study":
            words[words.index("configs/study.py")] = str(short_study(tmp_path))
        if door in ("train", "evaluate", "routing"):
            words += SHORT_THREE if "configs/quickstart.py" in words else SHORT
        done = run([sys.executable, *words[1:]])
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        expected = {
            "data": "⟦",
            "train": "report:",
            "convert": "arrays",
            "evaluate": "exact_match",
            "routing": "report:",
            "study": "report:",
            "generate": "",  # what it says is the model's; that it says something is checked below
        }[door]
        assert expected in done.stdout, line
        assert done.stdout.strip(), line
