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
