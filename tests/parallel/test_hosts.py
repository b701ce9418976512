"""Several processes on 127.0.0.1: the losses of one, nobody waits for the dead, and any number of them goes on."""

from __future__ import annotations

import collections
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
import psutil
import pytest

from mole_jax import cli
from mole_jax.data.mixture import Mixture
from mole_jax.files import absolute
from mole_jax.model.architecture import PRESETS
from mole_jax.tokenizer import Tokenizer
from mole_jax.training.loop import train
from tests import tiny
from tests.parallel.test_launch import address

# One worker takes them all: they share a run that was never stopped.
pytestmark = pytest.mark.xdist_group("hosts")
HOST = socket.gethostname()


class Job:
    """Real processes of one command, none of which outlives the test (`jobs`)."""

    def __init__(
        self,
        count: int,
        *command: str,
        folder,
        timeout=10,
        last: dict[str, str] | None = None,
        wraps: Mapping[int, Sequence[str]] | None = None,
        **env: str,
    ):
        """Starts the processes with variables `env`; the last of them with those of `last` too.

        `wraps` has the words before the command of some processes.
        """
        place, self.logs = address(), [folder / f"log{i}" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            flags = ["--coordinator", place, "--processes", str(count), "--process", str(i)]
            flags += ["--host-timeout", str(timeout)]
            own = {**os.environ, "JAX_PLATFORMS": "cpu", **env, **((last or {}) if i == count - 1 else {})}
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*(wraps or {}).get(i, ()), sys.executable, *command, *flags],
                        env=own,
                        cwd=tiny.ROOT,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self) -> list[int]:
        return [process.wait(timeout=600) for process in self.processes]

    def lines(self, process: int) -> list[str]:
        return self.logs[process].read_text().splitlines()


@pytest.fixture
def jobs():
    """Starts a `Job`; what still runs of it at the end of the test is killed."""
    started = []

    def start(*arguments, **options) -> Job:
        started.append(Job(*arguments, **options))
        return started[-1]

    yield start
    for job in started:
        for process in job.processes:
            process.kill()
            process.wait()


MEETINGS = """
import argparse, os, signal, sys, time
from mole_jax.errors import UserError, run_door
from mole_jax.parallel.launch import add_flags

def told(check):
    try:
        check()
    except UserError as error:
        print(f"told: {error}", flush=True)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("end")
    add_flags(parser)
    flags = parser.parse_args()
    from mole_jax.parallel import hosts
    with hosts.joined(flags, preemptible=False):
        import jax
        me = jax.process_index()
        print("first:", hosts.first("number", lambda: [me, 7]), "gathered:", hosts.gathered("number", me), flush=True)
        hosts.agree("config", {"rows": 8})
        told(lambda: hosts.agree("config", {"rows": 8 + 8 * me, "seed": 0}))
        if flags.end == "frozen":
            hosts.barrier("breakfast")
            if me == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            hosts.barrier("lunch")
        if flags.end == "killed":
            if me == 0:
                told(lambda: hosts.barrier("lunch", timeout=1))
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        if me == 1:
            raise UserError("the disk of process 1 is full; free some")
        hosts.barrier("supper")

run_door(main)
"""


def test_meetings_and_the_death_of_the_coordinator(meetings):
    job = meetings(2, "killed")
    began = time.monotonic()
    assert job.wait() == [-signal.SIGKILL, 1]
    assert time.monotonic() - began < 300, "process 1 would have slept for ten minutes"
    first, second = job.lines(0), job.lines(1)
    assert "first: [0, 7] gathered: [0, 1]" in first
    assert "first: [0, 7] gathered: None" in second
    differs = f"told: config: process 1 on {HOST} has rows 16, process 0 on {HOST} 8; start all processes with the same"
    for lines in (first, second):
        assert any(line.startswith(differs) for line in lines)
    assert any(line.startswith(f"told: lunch: after 1 s process 1 on {HOST} had not come;") for line in first)
    last = f"error: process 0 on {HOST} is gone; process 1 on {HOST} stops too; the same command on all resumes the run"
    assert last in second


def test_one_mistake_stops_all(meetings):
    """A process that finds its own mistake does not leave the others waiting for it."""
    job = meetings(2, "mistaken")
    assert job.wait() == [2, 2]
    mistake = "the disk of process 1 is full; free some"
    assert f"error: {mistake}" in job.lines(1)
    assert f"error: process 1 on {HOST} stopped: {mistake}; process 0 on {HOST} stops too" in job.lines(0)


@pytest.fixture
def meetings(jobs, tmp_path):
    """Starts `MEETINGS`."""
    (tmp_path / "meetings.py").write_text(MEETINGS)

    def start(count: int, end: str, **options) -> Job:
        return jobs(count, str(tmp_path / "meetings.py"), end, folder=tmp_path, PYTHONPATH=str(tiny.ROOT), **options)

    return start


def is_frozen(process: subprocess.Popen) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def ends(job: Job, began: float, seconds: float) -> list[int]:
    """Returns the statuses of all processes but the first, which have to end in time."""
    return [process.wait(timeout=max(0, began + seconds - time.monotonic())) for process in job.processes[1:]]


def test_a_frozen_coordinator_is_named_in_time(meetings):
    """Every call to it blocks, and still the others end by themselves, each with the line that names it."""
    job = meetings(3, "frozen", timeout=4)
    until(job, lambda: is_frozen(job.processes[0]))
    assert ends(job, time.monotonic(), 4 + 5) == [1, 1]
    line = f"error: process 0 on {HOST} is gone (no sign of life for 4 s); process {{}} on {HOST} stops too; "
    for i in (1, 2):
        assert line.format(i) + "the same command on all resumes the run" in job.lines(i)
    # It goes on when it is thawed, and then finds out about the others as it would have before.
    job.processes[0].send_signal(signal.SIGCONT)
    assert job.processes[0].wait(timeout=60) == 1
    assert any("is gone (no sign of life for 4 s); process 0" in line for line in job.lines(0))


@pytest.mark.parametrize(
    ("last", "differs"),
    [
        ({"JAX_ENABLE_X64": "1"}, "process 1 on {0} has jax_enable_x64 True, process 0 on {0} False"),
        (
            {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
            "process 1 on {0} has jax_default_matmul_precision 'highest', process 0 on {0} None",
        ),
        (
            {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true --xla_dump_to=/tmp/nowhere"},
            "process 1 on {0} has XLA_FLAGS '--xla_cpu_enable_fast_math=true', process 0 on {0} ''",
        ),
    ],
)
def test_a_flag_of_jax_on_one_process_is_told_before_anything_is_computed(meetings, last, differs):
    job = meetings(2, "mistaken", last=last, XLA_FLAGS="")
    assert job.wait() == [2, 2]
    for i in (0, 1):
        (line,) = (line for line in job.lines(i) if line.startswith("error: settings of jax"))
        assert line.startswith(f"error: settings of jax: {differs.format(HOST)}; start all processes with the same")
        assert not any(line.startswith("first:") for line in job.lines(i))


EPOCHS = 4
DEVICES = f"{tiny.CHILD_FLAGS} --xla_force_host_platform_device_count="


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Epochs by size (every record as often as there are epochs) on four devices, whoever has them."""
    folder = tmp_path_factory.mktemp("data")
    return tiny.write_config(
        folder / "config.py",
        tiny.write_data(folder),
        data={"mix": "size"},
        train={"steps": None, "epochs": float(EPOCHS)},
        checkpoint={"every": 5},
        evaluation={"tasks": ()},
        mesh={"data": 4},
    )


@pytest.fixture
def started(jobs, config, tmp_path_factory):
    """Starts the training in a workdir with some number of processes, which share four devices."""

    def start(workdir, count: int) -> Job:
        folder = tmp_path_factory.mktemp("job")
        command = ("-m", "mole_jax.train", "--config", str(config), "--workdir", str(workdir))
        return jobs(count, *command, folder=folder, XLA_FLAGS=f"{DEVICES}{4 // count}")

    return start


def metrics(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def newest(workdir) -> int:
    folder = workdir / "checkpoints"
    return max((int(one.name) for one in folder.iterdir() if one.name.isdigit()), default=0) if folder.exists() else 0


def until(job: Job, condition) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "not reached in ten minutes"
        assert all(process.poll() is None for process in job.processes), job.lines(0)[-20:]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """The run of one process, this one, that never stopped."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    train(cli.load_config(str(config)), absolute(str(workdir)))
    return workdir


def same_losses(workdir, one):
    ours, theirs = metrics(workdir), metrics(one)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    names = ("loss", "loss/general", "loss/document", "loss/biomedical", "grad_norm", "supervised_tokens")
    for name in names:
        left, right = ([line.get(name, -1) for line in lines] for lines in (ours, theirs))
        np.testing.assert_allclose(left, right, rtol=1e-5, err_msg=name)


def check_same(workdir, one):
    same_losses(workdir, one)
    report = json.loads((workdir / "data_report.json").read_text())
    assert report == json.loads((one / "data_report.json").read_text())
    assert {name: domain["examples"] for name, domain in report["domains"].items()} == dict.fromkeys(
        ("general", "document", "biomedical"), 24 * EPOCHS
    )


def drawn(config, state, parts: int, batches: int | None) -> list[tuple]:
    """Record names of the next batches, or of all that are left, by `parts` processes from a saved place."""
    settings = runpy.run_path(str(config))["get_config"]()
    arch = PRESETS[settings.model.preset]
    mixtures = [
        Mixture.build(
            settings.data,
            seed=settings.seed,
            tokenizer=Tokenizer.load(tiny.TOKENIZER),
            image=arch.image,
            rows=settings.train.batch_rows,
            epochs=settings.train.epochs,
            part=part,
            parts=parts,
        )
        for part in range(parts)
    ]
    names = []
    for mixture in mixtures:
        if state is not None:
            mixture.set_state(state)
    while batches is None or len(names) < batches:
        rows = [row for mixture in mixtures for row in next(mixture).record_ids]
        if not any(rows):
            break
        names.append(tuple(map(tuple, rows)))
    return names


@pytest.mark.slow
def test_killed_with_two_resumed_with_four(config, one, started, tmp_path):
    """SIGKILL to one of two: the other ends by itself and says so; four go on to the losses of one process."""
    workdir = tmp_path / "run"
    job = started(workdir, 2)
    until(job, lambda: newest(workdir) >= 5)
    job.processes[1].kill()
    killed = time.monotonic()
    assert job.wait() == [1, -signal.SIGKILL]
    assert time.monotonic() - killed < 60, "host-timeout is 10 s"
    line = f"error: process 1 on {HOST} is gone (no sign of life for 10 s); process 0 on {HOST} stops too; "
    assert line + "the same command on all resumes the run" in job.lines(0)
    step = newest(workdir)
    assert 5 <= step < len(metrics(one))
    (file,) = (workdir / "checkpoints" / str(step) / "data").glob("metadata")
    place = json.loads(file.read_text())

    again = started(workdir, 4)
    assert again.wait() == [0] * 4, again.lines(0)[-20:]
    assert any(f"from step {step} in " in line for line in again.lines(0))
    assert any("4 processes; each reads 2 of 8 shards of the data" in line for line in again.lines(0))
    assert not any("step " in line for line in again.lines(1)), "one process speaks"
    check_same(workdir, one)
    # What the two had and what the four then get is every record of every epoch, once each.
    before, after = drawn(config, None, 1, step), drawn(config, place, 4, None)
    assert before + after == drawn(config, None, 1, None)
    assert len(before + after) == len(metrics(one))
    names = collections.Counter(name for batch in before + after for row in batch for name in row)
    assert len(names) == 3 * 24
    assert set(names.values()) == {EPOCHS}


@pytest.mark.slow
def test_a_sigterm_to_one_stops_all_at_one_step_and_one_resumes(one, started, tmp_path):
    workdir = tmp_path / "run"
    job = started(workdir, 2)
    until(job, lambda: (workdir / "metrics.jsonl").exists() and len(metrics(workdir)) >= 3)
    job.processes[1].terminate()
    assert job.wait() == [143, 143], job.lines(0)[-20:]
    step = newest(workdir)
    assert f"stopped by SIGTERM at step {step}; the same command resumes from there" in job.lines(0)
    assert step == len(metrics(workdir)) < len(metrics(one))
    # A SIGTERM that comes before a resumed run has made its first step is not lost.
    again = started(workdir, 2)
    until(again, lambda: any(f"from step {step} in " in line for line in again.lines(0)))
    again.processes[0].terminate()
    assert again.wait() == [143, 143], again.lines(0)[-20:]
    assert newest(workdir) == step + 1
    again = started(workdir, 1)
    assert again.wait() == [0], again.lines(0)[-20:]
    check_same(workdir, one)


@pytest.mark.slow
def test_a_coordinator_frozen_while_training_is_named_and_the_run_resumes(one, started, tmp_path):
    workdir = tmp_path / "run"
    job = started(workdir, 2)
    until(job, lambda: newest(workdir) >= 5)
    job.processes[0].send_signal(signal.SIGSTOP)
    assert ends(job, time.monotonic(), 10 + 10) == [1]
    assert any(
        line.startswith(f"error: process 0 on {HOST} is gone (no sign of life for 10 s)") for line in job.lines(1)
    )
    job.processes[0].kill()
    job.processes[0].wait()
    again = started(workdir, 1)
    assert again.wait() == [0], again.lines(0)[-20:]
    check_same(workdir, one)
