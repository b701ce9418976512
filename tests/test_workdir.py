"""A workdir belongs to one process at a time, and one that cannot be used is refused in a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from etils import epath

from mole_jax.config import TaskConfig
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.workdir import claimed
from tests import tiny
from tests.chaos import doors

HOLD = (
    "import sys, time\nfrom etils import epath\nfrom mole_jax.workdir import claimed\n"
    "with claimed(epath.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
)


def test_a_second_process_is_refused_and_a_kill_frees_the_folder(tmp_path):
    folder = epath.Path(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process {holder.pid} on \S+ works there") as caught, claimed(folder):
            pass
        assert str(folder) in str(caught.value)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with claimed(folder):
            assert f'"pid": {os.getpid()}' in (folder / ".lock").read_text()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file", "File exists"),
        ("file/run", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("dangling", r"dangling is a link to nowhere, which is not there\); remove the link"),
        ("/sys/kernel/run", "Operation not permitted|Permission denied|Read-only"),
        ("/proc/run", "No such file or directory"),
    ],
)
def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, name, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=why) as caught, claimed(absolute(name)):
        pass
    assert str(absolute(name)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError, match="is no name of a folder or file"):
        absolute(name)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", ["--config", "CONFIG", "--workdir", "URL"]),
        ("evaluate", ["--config", "CONFIG", "--checkpoint", "none", "--workdir", "URL"]),
        ("evaluate", ["--config", "CONFIG", "--checkpoint", "URL", "--workdir", "out"]),
        ("evaluate", ["--compare", "URL", "b"]),
        ("routing", ["--config", "CONFIG", "--checkpoint", "none", "--workdir", "URL"]),
        ("convert", ["--input", "URL", "--output", "out", "--to", "hf"]),
        ("convert", ["--input", "none", "--output", "URL", "--to", "hf"]),
        ("generate", ["--checkpoint", "URL", "--question", "What?"]),
        ("generate", ["--checkpoint", "none", "--questions", "a.jsonl", "--output", "URL"]),
        ("generate", ["--checkpoint", "none", "--questions", "URL", "--output", "b.jsonl"]),
        ("synthetic.__main__", ["--output", "URL"]),
        ("study.__main__", ["--config", "STUDY", "--workdir", "URL"]),
        ("data.__main__", ["--config", "CONFIG", "--evaluation.tasks.0.path", "URL"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-2],
)
def test_a_url_of_an_unknown_kind_is_one_line(tmp_path, monkeypatch, command, flags):
    task = TaskConfig("general", str(tmp_path / "none.json"))
    config = tiny.write_config(tmp_path / "config.py", tmp_path, evaluation={"tasks": (task,)})
    config.write_text(f"from mole_jax.config import *\n{config.read_text()}")
    study = tmp_path / "study.py"
    study.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT)!r})\nfrom pathlib import Path\nfrom tests.study import small\n"
        f"def get_study():\n    return small.study(Path({str(tmp_path)!r}))\n"
    )
    monkeypatch.chdir(tmp_path)
    names = {"URL": "nowhere://bucket/run", "CONFIG": str(config), "STUDY": str(study)}
    said = doors.here(command, *(names.get(flag, flag) for flag in flags))
    assert "nowhere://bucket/run: a path cannot begin with nowhere://" in said.line
    assert not list(tmp_path.glob("nowhere*"))


@pytest.mark.parametrize("command", ["evaluate", "routing"])
def test_commands_tell_of_their_workdir_before_they_open_a_checkpoint(tmp_path, command):
    task = TaskConfig("general", str(tmp_path / "none.json"))
    config = tiny.write_config(tmp_path / "config.py", tmp_path, evaluation={"tasks": (task,)})
    config.write_text(f"from mole_jax.config import *\n{config.read_text()}")
    folder = epath.Path(tmp_path / "out")
    flags = ["--config", str(config), "--checkpoint", "none", "--workdir", str(folder)]
    with claimed(folder):
        ran = subprocess.run(
            [sys.executable, "-m", f"mole_jax.{command}", *flags], cwd=tiny.ROOT, capture_output=True, text=True
        )
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"error: {folder}: process {os.getpid()} on ")
