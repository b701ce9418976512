"""Folders that cannot be used, or are another process's: one line and status 2 before any work is done."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mole_jax.files import absolute
from tests import tiny
from tests.chaos import doors
from tests.chaos.results import check_same
from tests.study import small

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos_workdirs")]


def linked(folder: Path, target: str) -> Path:
    (folder / "link").symlink_to(target)
    return folder / "link"


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("hello")
    return folder / "file"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


MISTAKES: dict[str, Callable[[Path], object]] = {
    "empty": lambda folder: "",
    "a file": a_file,
    "below a file": lambda folder: a_file(folder) / "run",
    "a pipe": a_pipe,
    "a device": lambda folder: "/dev/null",
    "a dangling link": lambda folder: linked(folder, "nowhere"),
    "a link to a file": lambda folder: linked(folder, str(a_file(folder))),
    "a link to itself": lambda folder: linked(folder, "link"),
    "below a link to itself": lambda folder: linked(folder, "link") / "run",
    "name too long": lambda folder: folder / ("x" * 300),
    "path too long": lambda folder: folder.joinpath(*["x" * 200] * 25),
    "read-only": lambda folder: "/sys/kernel/run",
    "in /proc": lambda folder: "/proc/run",
    "no such scheme": lambda folder: "nowhere://bucket/run",
}
GOOD_NAMES = ("a b", "a#b?c%20d|e", "a\nb", "ä-日本", "-a'\"b:c", "~", "a//b/../c/")


def ask(door: str, config: Path, whole: Path, output: object) -> doors.Said:
    below = f"{output}/a.jsonl" if door == "generate" and output else output
    arguments = {
        "train": ("--config", config, f"--workdir={output}"),
        "evaluate": ("--config", config, "--checkpoint", whole, f"--workdir={output}"),
        "routing": ("--config", config, "--checkpoint", whole, f"--workdir={output}"),
        "convert": ("--input", whole, f"--output={output}", "--to", "hf"),
        "generate": ("--checkpoint", whole, "--questions", asked(config), f"--output={below}"),
        "synthetic": (f"--output={output}", "--train", "3", "--test", "3"),
        "study": ("--config", study(config), f"--workdir={output}"),
    }
    package = door in ("study", "synthetic")
    return doors.here(f"{door}.__main__" if package else door, *arguments[door])


def asked(config: Path) -> Path:
    file = config.parent / "questions.jsonl"
    file.write_text('{"question_id": 1, "text": "What is on the right?"}\n')
    return file


def study(config: Path) -> Path:
    """A small study; its base and data are made once."""
    file = config.parent / "study" / "study.py"
    if file.exists():
        return file
    file.parent.mkdir()
    small.write(file.parent)
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT)!r})\nfrom pathlib import Path\nfrom tests.study import small\n"
        f"def get_study():\n    return small.study(Path({str(file.parent)!r}))\n"
    )
    return file


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("door", ["train", "evaluate", "routing", "convert", "generate", "synthetic", "study"])
def test_mistakes(config, whole, tmp_path, door, mistake):
    output, before = mistake(tmp_path), {file: file.lstat().st_mtime for file in tmp_path.rglob("*")}
    said = ask(door, config, whole, output)
    assert said.line
    assert {file: file.lstat().st_mtime for file in tmp_path.rglob("*")} == before, "nothing is left behind"


@pytest.mark.parametrize("name", GOOD_NAMES)
@pytest.mark.parametrize("door", ["train", "evaluate", "routing", "convert", "generate", "synthetic"])
def test_odd_names_work(config, whole, tmp_path, monkeypatch, door, name):
    monkeypatch.chdir(tmp_path)
    said = ask(door, config, whole, name)
    assert said.status == 0, said
    assert absolute(name).is_dir()
    if door == "train":
        check_same(Path(absolute(name)), whole)
        assert ask("evaluate", config, Path(absolute(name)), tmp_path / "scores").status == 0


def without_power() -> tuple[str, ...]:
    """Words before a command by which root gives up what it may do more than others."""
    return ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--") if os.geteuid() == 0 else ()


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read only", "nothing"])
@pytest.mark.parametrize("door", ["train", "evaluate", "convert", "generate", "synthetic"])
def test_no_permission(config, whole, tmp_path, door, mode):
    """A folder of mode `mode`."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=mode)
    output = folder / "run"
    arguments = {
        "train": ("--config", config, "--workdir", output),
        "evaluate": ("--config", config, "--checkpoint", whole, "--workdir", output),
        "convert": ("--input", whole, "--output", output, "--to", "hf"),
        "generate": ("--checkpoint", whole, "--questions", asked(config), "--output", output),
        "synthetic": ("--output", output, "--train", "3", "--test", "3"),
    }
    said = doors.apart(door, *arguments[door], wrap=without_power())
    assert "Permission denied" in said.line
    assert str(output) in said.line


@pytest.mark.parametrize("file", ["checkpoints", "metrics.jsonl", "base", "eval", "tokenizer.model"])
def test_a_run_that_this_user_may_not_read(config, whole, copy, file):
    (copy / file).chmod(0)
    said = doors.apart("train", "--config", config, "--workdir", copy, wrap=without_power())
    (copy / file).chmod(0o755)
    if file == "tokenizer.model":  # written anew from the base's at each start, so what is there is not read
        assert said.status == 0, said
        check_same(copy, whole)
    else:
        assert str(copy) in said.line


def started(config: Path, workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        doors.command("train", "--config", config, "--workdir", workdir),
        env=doors.ENVIRONMENT,
        cwd=tiny.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_commands_on_one_workdir(data, tmp_path):
    """The second is refused by pid and host, whichever command it is; the first does not notice; a kill frees it."""
    options = {"train": {"steps": 4000}, "checkpoint": {"every": 50}}
    config, workdir = tiny.write_config(tmp_path / "config.py", data, **options), tmp_path / "run"
    first = started(config, workdir)
    end = time.monotonic() + 150
    while not (workdir / "checkpoints" / "50").exists():
        assert time.monotonic() < end
        assert first.poll() is None
        time.sleep(0.05)
    for door in ("train", "evaluate", "routing"):
        said = ask(door, config, workdir, workdir)
        assert f"process {first.pid} on " in said.line, door
        assert "works there" in said.line
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    last = newest(workdir)
    third = started(config, workdir)
    while newest(workdir) <= last:
        assert time.monotonic() < end
        assert third.poll() is None, third.communicate()
        time.sleep(0.05)
    third.kill()
    third.communicate()


def newest(workdir: Path) -> int:
    return max((int(one.name) for one in (workdir / "checkpoints").iterdir() if one.name.isdigit()), default=0)


def test_two_commands_at_the_same_moment(config, whole, tmp_path):
    """Started together, one of them does all and the other is refused."""
    workdir = tmp_path / "run"
    both = [started(config, workdir) for _ in range(2)]
    said = [process.communicate(timeout=170)[1] for process in both]
    status = [process.returncode for process in both]
    if sorted(status) == [0, 0]:  # the second came when the first was through
        assert "from step 6 in" in said[0] + said[1]
    else:
        assert sorted(status) == [0, 2], said
        assert "works there" in said[status.index(2)]
    check_same(workdir, whole)
    shutil.rmtree(workdir)
