"""launch/slurm.sh on a real SLURM of one node: preempted, requeued, told of its time limit, and still the same run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mole_jax import cli
from mole_jax.files import absolute
from mole_jax.training.loop import train
from tests import tiny
from tests.parallel.test_hosts import DEVICES, metrics, newest, same_losses
from tests.parallel.test_launch import address

pytestmark = pytest.mark.slow
# Debian has the daemons where the path of an ordinary user does not lead.
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin"
STEPS, GPUS = 60, 2

# As little of SLURM as runs jobs; all of it in one folder, all daemons the user's own.
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=120
NodeName=localhost NodeAddr=127.0.0.1 CPUs={gpus} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=localhost PriorityTier=2
"""


class Cluster:
    """munged, slurmctld and slurmd, and the commands that speak to them."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, []
        self.environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        self.folder.chmod(0o711)  # munge wants its socket to be reachable by all
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = {name: address().partition(":")[2] for name in ("control", "node")}
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, user=user, gpus=GPUS, **ports))
        # SLURM looks for no devices in these files, it only counts them.
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.folder}/cgroup\n")
        files = {name: f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "seed")}
        self.daemon("munged", "--foreground", *files.values(), f"--socket={self.folder}/munge.socket")
        until((self.folder / "munge.socket").exists, 30)
        self.daemon("slurmctld", "-D")
        self.daemon("slurmd", "-D", "-N", "localhost")
        until(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T", check=False), 60)

    def daemon(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("w") as log:
            command = [str(shutil.which(name, path=PATH)), *arguments]
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def stop(self) -> None:
        if len(self.daemons) == 3:
            self.ask("scancel", "--signal=KILL", "--full", "--user", str(os.getuid()), check=False)
            self.ask("scancel", "--user", str(os.getuid()), check=False)
            gone = time.monotonic() + 30
            while time.monotonic() < gone and self.ask(
                "squeue", "--noheader", "--states=running,completing", check=False
            ):
                time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str, check: bool = True) -> str:
        ran = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert not check or ran.returncode == 0, f"{command}: {ran.stderr}"
        return ran.stdout.strip()

    def submit(self, config: Path, workdir: Path, log: Path) -> str:
        """Submits a training as a user does, and returns the number of its job."""
        settings = {
            "GPUS": str(GPUS),
            "PYTHON": sys.executable,
            "SBATCH_OPTIONS": f"--partition low --output {log}",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{DEVICES}2",
        }
        command = [str(tiny.ROOT / "launch" / "slurm.sh"), str(config), str(workdir)]
        ran = subprocess.run(command, env=self.environment | settings, capture_output=True, text=True, cwd=log.parent)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.split()[-1]

    def job(self, number: str) -> dict[str, str]:
        words = self.ask("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not reached in {seconds:g} s"
        time.sleep(0.1)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # pytest's own has too long a path for a socket
        made = Cluster(Path(folder))
        try:
            made.start()
            yield made
        except BaseException:
            for log in Path(folder).glob("*.log"):
                print(f"{log.name}:\n{log.read_text()[-2000:]}")
            raise
        finally:
            made.stop()


def test_a_job_is_interrupted_in_every_way_and_ends_as_if_it_had_not_been(cluster: Cluster, tmp_path: Path):
    config = tiny.write_config(
        tmp_path / "config.py",
        tiny.write_data(tmp_path),
        train={"steps": STEPS},
        checkpoint={"every": 10},
        evaluation={"tasks": ()},
        mesh={"data": 4},
    )
    workdir, log = tmp_path / "run", tmp_path / "log"
    number = cluster.submit(config, workdir, log)

    def lines(text: str) -> list[str]:
        return [line for line in log.read_text().splitlines() if text in line] if log.exists() else []

    def interrupted(times: int) -> int:
        """Waits until the job has saved and is queued again; has it start and returns the step that it goes on from."""
        until(lambda: len(lines("stopped by SIGTERM at step ")) == times, 120)
        until(lambda: cluster.job(number)["JobState"] == "PENDING", 60)
        assert cluster.job(number)["Restarts"] == str(times)
        step = newest(workdir)
        assert lines("stopped by SIGTERM at step ")[-1].startswith(f"stopped by SIGTERM at step {step};")
        until(lambda: not cluster.ask("squeue", "--noheader", "--partition", "high"), 60)
        # SLURM lets a job that comes back wait for two minutes.
        cluster.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
        until(lambda: len(lines(f"from step {step} in {workdir}")) == 1, 120)
        return step

    until(lambda: newest(workdir) >= 10, 180)
    assert lines("2 processes; each reads"), log.read_text()
    # A job of higher priority needs the node.
    cluster.ask("sbatch", "--partition=high", f"--ntasks={GPUS}", f"--output={tmp_path}/high", "--wrap=sleep 1")
    first = interrupted(1)
    # An administrator puts it back, while it has not made a step yet.
    cluster.ask("scontrol", "requeue", number)
    second = interrupted(2)
    assert second == first + 1
    # What `--signal TERM@120` sends before the time limit: to the tasks, not to the script.
    until(lambda: len(metrics(workdir)) > second, 120)
    cluster.ask("scancel", "--signal=TERM", number)
    assert second < interrupted(3) < STEPS
    until(lambda: cluster.job(number)["JobState"] not in ("RUNNING", "COMPLETING"), 300)
    job = cluster.job(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()[-3000:]
    assert lines("report: ")
    one = tmp_path / "one"
    train(cli.load_config(str(config)), absolute(one))
    same_losses(workdir, one)


def test_a_mistake_does_not_go_back_into_the_queue(cluster: Cluster, tmp_path: Path):
    number = cluster.submit(tmp_path / "none.py", tmp_path / "run", tmp_path / "log")
    until(lambda: cluster.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 120)
    job = cluster.job(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert f"error: --config: no such file '{tmp_path}/none.py'" in (tmp_path / "log").read_text()
