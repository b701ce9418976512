"""`python -m mole_jax.train` as a user runs it: files left, kills survived, mistakes answered."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import pytest

from mole_jax import cli
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.training.setup import set_up
from tests import tiny

# One worker takes them all: they share an uninterrupted run, which takes most of a minute.
pytestmark = pytest.mark.xdist_group("doors")
STEPS = 60
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": tiny.CHILD_FLAGS}


def command(config, workdir, *overrides):
    return [sys.executable, "-m", "mole_jax.train", "--config", str(config), "--workdir", str(workdir), *overrides]


def run(config, workdir, *overrides):
    line = command(config, workdir, *overrides)
    return subprocess.run(line, env=ENVIRONMENT, cwd=tiny.ROOT, capture_output=True, text=True, check=False)


def losses(workdir):
    """Everything in metrics.jsonl that does not depend on the clock."""
    timed = ("tokens_per_second", "step_seconds", "data_wait_fraction", "mfu", "memory_gib")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(data):
    """Sixty steps with dropout and a checkpoint every tenth, on one device."""
    return tiny.write_config(
        data / "config.py",
        data,
        train={"steps": STEPS},
        checkpoint={"every": 10},
        adapter={"rank": 2, "alpha": 4.0, "dropout": 0.1},
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = run(config, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_leaves_what_the_design_promises(whole):
    workdir, done = whole
    files = ("config.json", "metrics.jsonl", "trainable.json", "data_report.json", "report.html", "tokenizer.model")
    for name in files:
        assert (workdir / name).stat().st_size > 0, name
    assert {int(child.name) for child in (workdir / "checkpoints").iterdir()} == {50, 60}
    assert list((workdir / "tensorboard").iterdir())
    lines = losses(workdir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = {"loss", "loss/general", "loss/document", "loss/biomedical", "balance_loss", "router/entropy"}
    assert names <= set(lines[0])
    before, after = (json.loads((workdir / "eval" / f"step_{step:08d}.json").read_text()) for step in (0, STEPS))
    for name in ("general", "document"):
        assert after["tasks"][name]["loss"] < before["tasks"][name]["loss"]
        assert after["tasks"][name]["questions"] == 4
        assert len((workdir / "eval" / "step_00000060" / f"{name}.jsonl").read_text().splitlines()) == 4
    use = json.loads((workdir / "eval" / "expert_use.json").read_text())
    assert use["domains"] == ["general", "document"]
    assert all(abs(sum(layer) - 1) < 1e-6 for domain in use["use"] for layer in domain)
    # A person reads what trains, the losses and the scores.
    assert "decoder/layers/mlp/gate_proj/adapter/a" in done.stderr
    assert "held-out loss" in done.stderr
    assert "score after" in done.stdout
    checkpoint = sum(file.stat().st_size for file in (workdir / "checkpoints" / "60" / "params").rglob("*"))
    trained = sum(row["numbers"] for row in json.loads((workdir / "trainable.json").read_text()))
    assert checkpoint < 3 * 4 * trained + 200_000, "the frozen base must not be in a checkpoint"


def test_a_killed_run_resumes_to_the_same_bits(config, whole, tmp_path):
    """SIGKILL at a random step, the same command again: every number of every step equals the uninterrupted run's."""
    workdir = tmp_path / "run"
    step = random.SystemRandom().randint(12, 40)
    process = subprocess.Popen(
        command(config, workdir), env=ENVIRONMENT, cwd=tiny.ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wait_for_step(process, workdir, step)
    wait_for(lambda: (workdir / "checkpoints" / "10").is_dir(), process)
    process.kill()
    process.wait()
    reached = losses(workdir)[-1]["step"]
    again = run(config, workdir)
    assert again.returncode == 0, again.stderr
    assert reached == STEPS or "from step" in again.stderr, "a checkpoint was there to resume from"
    assert losses(workdir) == losses(whole[0]), f"killed at step {reached}"
    results = [json.loads((folder / "eval" / "step_00000060.json").read_text()) for folder in (workdir, whole[0])]
    assert results[0] == results[1]


def test_a_second_start_compiles_nothing(config, tmp_path):
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "kept"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    starts = []
    for name in ("one", "two"):
        line = command(config, tmp_path / name, "--train.steps", "1", "--checkpoint.every", "1")
        done = subprocess.run(line, env=ENVIRONMENT | kept, cwd=tiny.ROOT, capture_output=True, text=True, check=True)
        starts.append(json.loads((tmp_path / name / "starts.jsonl").read_text()))
        assert "first step after " in done.stderr
    first, second = starts
    assert first["versions"]["jax"] == jax.__version__
    assert first["machine"] == "1 x cpu"
    assert first["step"] == second["step"] == 1
    assert first["compiled"] > 1  # with those of the evaluation before
    assert (second["compiled"], second["found"]) == (0, first["compiled"] + first["found"])
    parts = {"imports", "devices", "data", "weights", "evaluation", "compilation", "first step"}
    assert parts <= second.keys()
    assert all(second[part] >= 0 for part in parts)


def test_sigterm_saves_and_the_same_command_resumes(config, whole, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(config, workdir, "--data.workers", "2"),
        env=ENVIRONMENT,
        cwd=tiny.ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(process, workdir, 5)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal arrived")
    assert process.returncode == 143, stderr
    stopped = int(stderr.split("stopped by SIGTERM at step ")[1].split(";")[0])
    assert (workdir / "checkpoints" / str(stopped)).is_dir(), "saved at the very step, not at the last multiple of 10"
    again = run(config, workdir)
    assert f"from step {stopped}" in again.stderr
    assert losses(workdir) == losses(whole[0])


def wait_for_step(process, workdir, step):
    file = workdir / "metrics.jsonl"
    wait_for(lambda: file.exists() and file.read_text().count("\n") >= step, process)


def wait_for(condition, process):
    end = time.monotonic() + 180
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "not reached in three minutes"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--mesh.fsdp", "9", "--mesh.data", "1"], "mesh.data 1 x mesh.fsdp 9 needs 9 devices, there are 8"),
        (["--model.preset", "tinny"], "model.preset 'tinny' is unknown, did you mean 'tiny'?"),
        (["--data.domains.0.path", "nowhere.json"], "nowhere.json: no such file"),
        (["--data.sequence_length", "4"], "data.sequence_length 4 has no place for an image"),
        (["--data.sequence_length", "600"], "data.sequence_length 600 is over the 512 positions"),
        (["--evaluation.tasks.0.path", "nowhere.json"], "nowhere.json: no such file"),
        (["--train.batch_rows", "6", "--train.accumulation", "4"], "train.batch_rows 6 does not divide into"),
    ],
)
def test_mistakes_get_one_line(config, tmp_path, overrides, message):
    with pytest.raises(UserError) as caught:
        set_up(cli.load_config(str(config), overrides), absolute(str(tmp_path / "run")))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_config_in_the_same_workdir_is_refused_with_status_2(config, whole):
    done = run(config, whole[0], "--optimizer.learning_rate", "0.5")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "holds a run whose optimizer.learning_rate is 0.01, the config has 0.5" in line


def test_a_refused_config_does_not_tie_the_folder(config, tmp_path):
    """After a mistake, the corrected command works in the same workdir."""
    workdir = absolute(str(tmp_path / "run"))
    with pytest.raises(UserError, match="no such file"):
        set_up(cli.load_config(str(config), ["--data.domains.0.path", "nowhere.json"]), workdir)
    assert set_up(cli.load_config(str(config), []), workdir).total_steps == STEPS


def test_evaluate_finds_what_the_run_found(config, whole, tmp_path):
    """Another process, from the checkpoint alone: the same loss, score and answers as at the end of the training."""
    line = [sys.executable, "-m", "mole_jax.evaluate", "--config", str(config), "--checkpoint", str(whole[0])]
    done = subprocess.run(
        [*line, "--workdir", str(tmp_path)], env=ENVIRONMENT, cwd=tiny.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout
    for name in (f"step_{STEPS:08d}.json", f"step_{STEPS:08d}/general.jsonl"):
        assert (tmp_path / "eval" / name).read_text() == (whole[0] / "eval" / name).read_text()
    again = subprocess.run(
        [*line, "--workdir", str(whole[0])], env=ENVIRONMENT, cwd=tiny.ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "results are there already; choose another --workdir" in again.stderr
