"""SIGKILL at any moment: the same command again goes on, and in the end every bit is that of a run left alone."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.chaos import doors
from tests.chaos.results import check_same
from tests.parallel.test_hosts import DEVICES, jobs  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos_kills")]

STEPS = 80
KILLS = 5
"""In one trial; then it may come through."""


@pytest.fixture(scope="module")
def config(data, tmp_path_factory) -> Path:
    """Dropout, so that random draws matter; checkpoints and evaluations at other steps."""
    return tiny.write_config(
        tmp_path_factory.mktemp("kills") / "config.py",
        data,
        train={"steps": STEPS},
        checkpoint={"every": 8, "keep_last": 2},
        adapter={"rank": 2, "alpha": 4.0, "dropout": 0.1},
        evaluation={"every": 20, "batch_size": 1},
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = doors.apart("train", "--config", config, "--workdir", workdir)
    assert done.status == 0, done.err
    return workdir


def start(config: Path, workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        doors.command("train", "--config", config, "--workdir", workdir),
        env=doors.ENVIRONMENT,
        cwd=tiny.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def steps(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def kill_when(process: subprocess.Popen, reached: Callable[[], bool]) -> bool:
    """Kills the process as soon as `reached` says so; returns False where it ended before."""
    end = time.monotonic() + 150
    while process.poll() is None and not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.001)
    process.kill()
    return process.wait() < 0


def comes_through(config: Path, workdir: Path, whole: Path) -> None:
    done = doors.apart("train", "--config", config, "--workdir", workdir)
    assert done.status == 0, done.err
    assert not done.warnings
    check_same(workdir, whole)
    assert not list(workdir.rglob("*.partial*")) + list(workdir.rglob("*tmp*")), "what a kill left half is cleared"


@pytest.mark.parametrize("seed", [0, 1])
def test_at_random_moments(config, whole, tmp_path, seed):
    """Half of the kills at a random time, at whatever the start or the end does then, half at a random step."""
    draw, workdir, killed = random.Random(seed), tmp_path / "run", 0
    for _ in range(KILLS):
        process = start(config, workdir)
        moment, more = time.monotonic() + draw.uniform(0.5, 9), draw.randrange(1, 25)
        begun = steps(workdir)
        by_time = draw.random() < 0.5

        def now(by_time=by_time, moment=moment, goal=begun + more) -> bool:
            return time.monotonic() > moment if by_time else steps(workdir) > goal

        killed += kill_when(process, now)
    assert killed >= 2
    comes_through(config, workdir, whole)


def test_within_a_save(config, whole, tmp_path):
    """Killed while a checkpoint has its temporary name, twice."""
    workdir, within = tmp_path / "run", 0
    folder = workdir / "checkpoints"

    def saving() -> bool:
        return folder.exists() and any("tmp" in one.name for one in folder.iterdir())

    for _ in range(5):
        before = {one.name for one in folder.iterdir()} if folder.exists() else set()
        process = start(config, workdir)
        # What an earlier kill left is cleared at the start; a save is one that comes later.
        kill_when(process, lambda before=before: saving() and not {one.name for one in folder.iterdir()} <= before)
        within += saving()
        if within == 2:
            break
    assert within == 2, "no kill came within a save"
    comes_through(config, workdir, whole)


@pytest.mark.parametrize("step", [0, STEPS])
def test_within_an_evaluation(config, whole, tmp_path, step):
    workdir = tmp_path / "run"
    partial = workdir / "eval" / f"step_{step:08d}" / "document.partial.jsonl"
    assert kill_when(start(config, workdir), lambda: partial.exists() and partial.read_text().count("\n") > 1)
    assert partial.exists()
    comes_through(config, workdir, whole)


def test_within_the_report(config, whole, tmp_path):
    workdir = tmp_path / "run"
    assert kill_when(start(config, workdir), lambda: (workdir / "plots" / "losses.png").exists())
    comes_through(config, workdir, whole)
    assert (workdir / "report.html").exists()


def test_two_processes(data, jobs, tmp_path):  # noqa: F811
    """Both are killed at random steps, one a moment after the other, and started again."""
    config = tiny.write_config(
        tmp_path / "config.py",
        data,
        train={"steps": 60},
        checkpoint={"every": 7},
        mesh={"data": 2},
        evaluation={"every": 30},
    )
    draw = random.Random(0)

    def started(workdir: Path, log: str):
        (tmp_path / log).mkdir()
        command = ("-m", "mole_jax.train", "--config", str(config), "--workdir", str(workdir))
        return jobs(2, *command, folder=tmp_path / log, XLA_FLAGS=f"{DEVICES}1")

    alone = started(tmp_path / "alone", "log")
    assert alone.wait() == [0, 0], alone.lines(0)[-20:]
    workdir = tmp_path / "run"
    for number in range(2):
        job = started(workdir, f"log{number}")
        goal = steps(workdir) + draw.randrange(5, 25)
        killed = kill_when(job.processes[draw.randrange(2)], lambda goal=goal: steps(workdir) > goal)
        assert killed
        for process in job.processes:
            process.kill()
            process.wait()
    last = started(workdir, "last")
    assert last.wait() == [0, 0], last.lines(0)[-20:]
    check_same(workdir, tmp_path / "alone")
