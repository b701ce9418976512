"""A full disk: one line and status 2 soon after the write that failed, what is whole stays, and the command goes on.

Two kinds, both of which the kernel answers: a tmpfs that is full (ENOSPC), and files that may not grow (EFBIG).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.chaos import disks, doors
from tests.chaos.conftest import OPTIONS
from tests.chaos.results import check_same
from tests.parallel.test_hosts import DEVICES, jobs  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos_disk")]

FULL = re.compile("No space left on device|MiB are free, the next checkpoint needs|File too large")
SOON = 10.0
"""Seconds from the write that failed to the end of the process."""
KINDS = pytest.mark.parametrize("kind", ["tmpfs", "limit"])


def checkpoints(run: Path) -> set[str]:
    folder = run / "checkpoints"
    return {one.name for one in folder.iterdir() if one.name.isdigit()} if folder.is_dir() else set()


@pytest.mark.parametrize(
    ("disk", "files", "left"),
    [
        (64, 16, set()),
        (1400, 6, set()),
        (1600, 9, set()),
        (2150, 30, {"2", "4"}),
    ],
    ids=["base", "before the first step", "first checkpoint", "a later checkpoint"],
)
def test_a_disk_that_is_too_small(config, whole, tmp_path, disk, files, left):
    """A tmpfs of several sizes; where none can be mounted, a limit that hits the same files."""
    with disks.full("tmpfs", tmp_path / "disk", disk=disk, files=files) as small:
        command = ("train", "--config", config, "--workdir", small.path / "run")
        done = doors.apart(*command, wrap=small.wrap)
        ended = time.time()
        assert FULL.search(done.line), done.line
        written = max(file.stat().st_mtime for file in small.files.rglob("*") if file.is_file())
        assert ended - written < SOON
        if isinstance(small, disks.SmallDisk):
            assert checkpoints(small.files / "run") == left
        small.make_space()
        again = doors.apart(*command, wrap=small.wrap)
        assert again.status == 0, again.err
        assert f"from step {max(map(int, left))} in" in again.err if left else "a new run in" in again.err
        check_same(small.files / "run", whole)


@pytest.fixture(scope="module")
def lora(data, tmp_path_factory):
    """A run whose checkpoints are larger than its other files; its config and its folder."""
    folder = tmp_path_factory.mktemp("lora")
    options = {**OPTIONS, "train": {"steps": 6, "trainable": ("adapters", "projector")}, "adapter": {"kind": "lora"}}
    config = tiny.write_config(folder / "config.py", data, **options)
    done = doors.apart("train", "--config", config, "--workdir", folder / "run")
    assert done.status == 0, done.err
    return config, folder / "run"


@pytest.mark.parametrize(
    ("files", "what"),
    [(6, "tokenizer.model"), (9, "checkpoints"), (40, "plots/losses.png"), (60, "report.html")],
    ids=["tokenizer", "checkpoint", "plots", "report"],
)
def test_files_that_may_not_grow(lora, tmp_path, files, what):
    """Orbax and tensorstore meet the error themselves here; on a full disk it is foreseen before they begin."""
    config, whole = lora
    small = disks.LimitedFiles(tmp_path / "small", files)
    shutil.copytree(whole / "base", small.path / "run" / "base")  # written whole already
    command = ("train", "--config", config, "--workdir", small.path / "run")
    done = doors.apart(*command, wrap=small.wrap)
    assert FULL.search(done.line), done.line
    assert what in done.line
    small.make_space()
    again = doors.apart(*command, wrap=small.wrap)
    assert again.status == 0, again.err
    check_same(small.path / "run", whole)


def filled_at(small, command, reached) -> tuple[doors.Said, float]:
    """Runs a command, fills the disk when `reached` says so; returns what it said and the seconds from then on."""
    process = subprocess.Popen(
        [*small.wrap, *doors.command(*command)],
        env=doors.ENVIRONMENT,
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not reached() and process.poll() is None:
        assert time.monotonic() < end, "not reached in two minutes"
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    since = small.fill(process)
    out, err = process.communicate(timeout=120)
    return doors.Said(process.returncode, out, err), time.monotonic() - since


def lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture(scope="module")
def long(data, tmp_path_factory):
    """A run of 200 steps, with an evaluation of one question at a time; its config and its folder."""
    folder = tmp_path_factory.mktemp("long")
    options = {"train": {"steps": 200}, "checkpoint": {"every": 50}, "evaluation": {"batch_size": 1, "every": 150}}
    config = tiny.write_config(folder / "config.py", data, **options)
    done = doors.apart("train", "--config", config, "--workdir", folder / "run")
    assert done.status == 0, done.err
    return config, folder / "run"


@KINDS
@pytest.mark.parametrize("moment", ["metrics and tensorboard", "evaluation"])
def test_a_disk_that_fills_up_while_it_trains(long, tmp_path, kind, moment):
    config, whole = long
    with disks.full(kind, tmp_path / "disk", disk=disks.LARGE_KIB, files=disks.LARGE_KIB) as small:
        run, command = small.files / "run", ("train", "--config", config, "--workdir", small.path / "run")
        answers = run / "eval" / "step_00000200" / "general.partial.jsonl"
        reached = {"evaluation": answers.exists, "metrics and tensorboard": lambda: lines(run / "metrics.jsonl") > 70}
        done, seconds = filled_at(small, command, reached[moment])
        assert FULL.search(done.line), done.line
        assert seconds < SOON
        assert checkpoints(run)
        small.make_space()
        again = doors.apart(*command, wrap=small.wrap)
        assert again.status == 0, again.err
        assert "from step " in again.err
        check_same(run, whole)


def questions(folder: Path) -> Path:
    file = folder / "questions.jsonl"
    asked = ({"question_id": number, "text": f"What is on the right of number {number}?"} for number in range(60))
    file.write_text("".join(json.dumps(one) + "\n" for one in asked))
    return file


@pytest.mark.parametrize(
    ("door", "kind", "disk", "files"),
    [
        ("evaluate", "tmpfs", 4, 0.25),
        ("evaluate", "limit", 8, 0.6),
        ("routing", "tmpfs", 8, 4),
        ("convert hf", "tmpfs", 64, 40),
        ("convert mole", "limit", 8, 4),
        ("generate", "tmpfs", 4, 2),
        ("generate", "limit", 8, 6),
        ("synthetic", "tmpfs", 64, 4),
    ],
)
def test_other_commands(config, whole, tmp_path, door, kind, disk, files):
    door, _, to = door.partition(" ")
    with disks.full(kind, tmp_path / "disk", disk=disk, files=files) as small:
        output = small.path / "out"
        arguments = {
            "evaluate": ("--config", config, "--checkpoint", whole, "--workdir", output),
            "routing": ("--config", config, "--checkpoint", whole, "--workdir", output),
            "convert": ("--input", whole, "--output", output, "--to", to),
            "generate": ("--checkpoint", whole, "--questions", questions(tmp_path), "--output", output / "a.jsonl"),
            "synthetic": ("--output", output, "--train", "24", "--test", "8", "--tokenizer", output / "tokenizer"),
        }[door]
        began = time.monotonic()
        done = doors.apart(door, *arguments, wrap=small.wrap)
        assert FULL.search(done.line), done.line
        assert time.monotonic() - began < 100
        small.make_space()
        again = doors.apart(door, *arguments, wrap=small.wrap)
        assert again.status == 0, again


@pytest.mark.parametrize("who", ["all", "the first", "the second"])
def test_two_processes(config, data, jobs, tmp_path, who):  # noqa: F811
    """All on a full disk, or one of them unable to write: every process ends with status 2, and says why."""
    options = {**OPTIONS, "mesh": {"data": 2}, "evaluation": {"tasks": ()}}
    config = tiny.write_config(tmp_path / "config.py", data, **options)
    kind = "tmpfs" if who == "all" else "limit"
    with disks.full(kind, tmp_path / "disk", disk=1800, files=9) as small:
        command = ("-m", "mole_jax.train", "--config", str(config), "--workdir", str(small.path / "run"))
        affected = {"all": (0, 1), "the first": (0,), "the second": (1,)}[who]
        wraps = {process: small.wrap for process in affected}
        began = time.monotonic()
        job = jobs(2, *command, folder=tmp_path, wraps=wraps, XLA_FLAGS=f"{DEVICES}1")
        assert job.wait() == [2, 2], job.lines(0)[-20:] + job.lines(1)[-20:]
        assert time.monotonic() - began < 120
        said = [line for process in (0, 1) for line in job.lines(process) if line.startswith("error: ")]
        assert len(said) == 2, said
        assert any(FULL.search(line) for line in said), said
        assert not any("Traceback" in line for process in (0, 1) for line in job.lines(process))
        small.make_space()
        wraps = {process: small.wrap for process in affected} if small.wrap else {}
        (tmp_path / "again").mkdir()
        again = jobs(2, *command, folder=tmp_path / "again", wraps=wraps, XLA_FLAGS=f"{DEVICES}1")
        assert again.wait() == [0, 0], again.lines(0)[-20:]
