"""Every command of README, docs and CONTRIBUTING runs as written, on shortened runs, or is parsed; none is left out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests import tiny
from tests.tiny import ROOT

PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PAGES["CONTRIBUTING.md"] = (ROOT / "CONTRIBUTING.md").read_text()


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[page], flags=re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.strip().splitlines()]


def snippet(page: str, word: str) -> str:
    return next(one for one in re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL) if word in one)


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
DOORS = [line for line in COMMANDS if line.startswith(".venv/bin/python -m mole_jax.")]
SERVERS = [line for line in DOORS if " mole_jax.serve " in line]
AFTER_THE_QUICKSTART = [
    line for line in DOORS if ("runs/quickstart" in line or "configs/mine.py" in line) and line not in SERVERS
]
STUDIES = [line for line in DOORS if " mole_jax.study " in line]
CONFIGS = [line for line in DOORS if line not in AFTER_THE_QUICKSTART + STUDIES + SERVERS]
"""Trainings of models that are not here."""
PLANS = [line for line in COMMANDS if line.startswith("plan-env/bin/python -m mole_jax.plan ")]
BENCHMARKS = [line for line in COMMANDS if line.startswith("plan-env/bin/python -m benchmarks.")]
LAUNCHES = [line for line in COMMANDS if line.startswith("launch/")]
ENVIRONMENTS = [line for line in COMMANDS if line.startswith(("python -m venv plan-env", "plan-env/bin/pip "))]
COUNTS = [line for line in COMMANDS if line.startswith("REMAKE_COUNTS=1 ")]
MAKES = [line for line in COMMANDS if line.startswith("make ")]
SHORT = ["--train.steps", "2", "--evaluation.tasks.0.limit", "4"]
SHORT_THREE = [*SHORT, "--evaluation.tasks.1.limit", "4", "--evaluation.tasks.2.limit", "4"]


def run(line, cwd=ROOT):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": tiny.CHILD_FLAGS}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_every_command_is_of_a_kind_that_is_tested():
    known = DOORS + PLANS + BENCHMARKS + LAUNCHES + ENVIRONMENTS + COUNTS + MAKES
    assert not [line for line in COMMANDS if line not in known]
    for kind in (AFTER_THE_QUICKSTART, STUDIES, CONFIGS, PLANS, BENCHMARKS, LAUNCHES, MAKES):
        assert kind, "the pages are read"


def test_the_two_commands_of_the_readme_are_those_of_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    assert [line for line in commands("README.md") if line.startswith("make ")] == ["make quickstart", "make test"]
    assert all(line in ci for line in ("make quickstart", "make test"))


def test_what_make_is_asked_for_is_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {line.removeprefix("make ") for line in MAKES} <= set(targets)


@pytest.mark.parametrize("line", ENVIRONMENTS[1:])
def test_the_environment_that_plans_takes_what_make_installs(line):
    recipe = (ROOT / "Makefile").read_text()
    wanted = [word for word in shlex.split(line)[2:] if not word.startswith("-") and word != "."]
    assert wanted
    assert all(word in recipe for word in wanted)


@pytest.mark.parametrize("line", CONFIGS + PLANS)
def test_configs_and_overrides_are_understood(line):
    """The model is not here, or the machine is not; the settings are checked all the same."""
    done = run([sys.executable, *shlex.split(line)[1:], "--print-config"])
    assert done.returncode == 0, done.stderr
    assert "adapter" in done.stdout


@pytest.mark.parametrize("line", BENCHMARKS)
def test_options_of_benchmarks_are_there(line):
    words = shlex.split(line)
    done = run([sys.executable, *words[1:3], "--help"])
    assert done.returncode == 0, done.stderr
    assert not [word for word in words[3:] if word.startswith("--") and word not in done.stdout]


@pytest.mark.parametrize("line", COUNTS)
def test_the_file_of_counts_is_made_by_a_test_that_is_there(line):
    assert (ROOT / shlex.split(line)[-1]).is_file()


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


@pytest.mark.parametrize("line", SERVERS)
def test_the_server_answers_the_client_of_its_page(line):
    if not (ROOT / "runs" / "quickstart" / "mole" / "checkpoints").is_dir():
        pytest.skip("needs the quickstart's data and run: `make quickstart` first")
    words = [sys.executable, *shlex.split(line)[1:], "--port", "0"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = re.search(r"http://\S+", server.stdout.readline())[0]
            client = snippet("serving.md", "OpenAI").replace("http://127.0.0.1:8000/v1", url)
            done = run([sys.executable, "-c", client])
        finally:
            server.terminate()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert server.returncode == 0


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_lines(line):
    done = run(shlex.split(line))
    assert done.returncode == 0, done.stderr
    assert "mole_jax.train" in done.stdout


@pytest.mark.parametrize(
    "lines",
    [
        [line for line in AFTER_THE_QUICKSTART if line in commands("README.md")],
        pytest.param(AFTER_THE_QUICKSTART + STUDIES[:1], marks=pytest.mark.slow),
    ],
    ids=["README", "all pages"],
)
def test_the_commands_after_the_quickstart_in_their_order(lines, tmp_path):
    """Writes configs/mine.py of start.md, then runs all with what they write in `tmp_path` and two steps a run."""
    if not (ROOT / "runs" / "quickstart" / "mole" / "checkpoints").is_dir():
        pytest.skip("needs the quickstart's data and run: `make quickstart` first")
    (tmp_path / "mine.py").write_text(snippet("start.md", "get_config"))
    ours: dict[str, str] = {
        "configs/mine.py": str(tmp_path / "mine.py"),
        "configs/study.py": str(short_study(tmp_path)),
    }
    for line in lines:
        words = shlex.split(line)
        for option in ("--output", "--workdir"):
            if option in words:
                made = words[words.index(option) + 1]
                ours[made] = str(tmp_path / made)
        words = [ours.get(word, word) for word in words]
        door = words[2].removeprefix("mole_jax.")
        if door in ("train", "evaluate", "routing") and "--config" in words:
            words += SHORT_THREE if "configs/quickstart.py" in words else SHORT
        done = run([sys.executable, *words[1:]])
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        expected = {
            "data": "problem",
            "train": "report:",
            "convert": "arrays",
            "evaluate": "exact_match",
            "routing": "report:",
            "study": "report:",
            "generate": "",  # what it says is the model's; that it says something is checked below
        }[door]
        assert expected in done.stdout, line
        assert done.stdout.strip(), line
