"""Data workers: one that is killed is told of in a line, and none outlives a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests import tiny

PARENT = """
import sys, time
from pathlib import Path
from mole_jax.errors import run_door
from mole_jax.image_spec import ImageSpec
from mole_jax.data.mixture import Mixture
from mole_jax.tokenizer import Tokenizer
from tests import tiny

def main():
    config = tiny.config(Path(sys.argv[1]), data={"workers": 2}).data
    image = ImageSpec(size=28, side=2, token_id=511)
    mixture = Mixture.build(config, seed=0, tokenizer=Tokenizer.load(tiny.TOKENIZER), image=image, rows=8)
    for number in range(10**9):
        next(mixture)
        if number == 0:
            print("drawn", flush=True)

if __name__ == "__main__":
    run_door(main)
"""


def _started(folder: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    tiny.write_data(folder / "data")
    script = folder / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, str(script), str(folder / "data")], env=environment, **pipes)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "drawn\n"
    workers = [one for one in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    assert len(workers) == 2
    return parent, workers


def test_workers_end_when_their_parent_is_killed_and_leave_no_shared_memory(tmp_path):
    """An array that is just then being handed over belongs to no one and stays: that is not so three times."""
    for number in range(3):
        before = set(os.listdir("/dev/shm"))
        (tmp_path / str(number)).mkdir()
        parent, workers = _started(tmp_path / str(number))
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        end = time.monotonic() + 10
        while (left := {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")}) and (
            time.monotonic() < end
        ):
            time.sleep(0.2)
        if not left:
            break
    assert not left


LATE = """
import multiprocessing, os, signal, sys, time
from mole_jax.data import stream

def late():
    while os.getppid() == int(sys.argv[-1]):
        time.sleep(0.01)
    stream._start_worker(0, 1)
    time.sleep(600)

if __name__ == "__main__":
    sys.argv.append(str(os.getpid()))
    worker = multiprocessing.get_context("spawn").Process(target=late)
    worker.start()
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_whose_parent_was_killed_before_it_was_up_ends_too(tmp_path):
    (tmp_path / "parent.py").write_text(LATE)
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    parent = subprocess.run([sys.executable, str(tmp_path / "parent.py")], env=environment, stdout=subprocess.PIPE)
    assert parent.returncode == -signal.SIGKILL
    worker, end = int(parent.stdout), time.monotonic() + 30
    while (alive := psutil.pid_exists(worker)) and time.monotonic() < end:
        time.sleep(0.1)
    if alive:
        os.kill(worker, signal.SIGKILL)
    assert not alive


def test_a_killed_worker_is_one_line_and_status_2(tmp_path):
    parent, workers = _started(tmp_path)
    workers[0].send_signal(signal.SIGKILL)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == 2
    assert said.splitlines()[-1].startswith("error: a data worker ended with exit code -9")
    assert "Traceback" not in said
