"""A broken checkpoint, a full disk, a run that cannot be saved: each is one line, and what is whole stays."""

from __future__ import annotations

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.config import Config, MeshConfig
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.training.loop import train
from mole_jax.training.telemetry import read_metrics
from mole_jax.weights.checksums import checksum, checksums
from mole_jax.weights.open import open_model, open_source
from mole_jax.weights.run import read_meta
from tests import tiny

OPTIONS = {
    "train": {"steps": 6},
    "checkpoint": {"every": 2, "keep_last": 2, "keep_best": 0},
    "evaluation": {"tasks": ()},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A finished run with the checkpoints of steps 4 and 6."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    train(tiny.config(data, **OPTIONS), absolute(str(workdir)))
    return workdir


def _cut_array(step):
    file = max((step / "params").rglob("d/*"), key=lambda one: one.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])


def _zero_all(step):
    for file in step.rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    "spoil",
    [
        _cut_array,
        _zero_all,
        lambda step: shutil.rmtree(step / "optimizer"),
        lambda step: (step / "meta" / "metadata").write_text('{"arch'),
        lambda step: (step / "data" / "metadata").write_text('{"version": 2}'),
    ],
    ids=["array cut", "all zeroed", "no optimizer", "meta cut", "data position cut"],
)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_taken(data, whole, tmp_path, spoil, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    spoil(workdir / "checkpoints" / "6")
    train(tiny.config(data, **OPTIONS), absolute(str(workdir)))
    said = capsys.readouterr().err
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert f"{workdir / 'checkpoints' / '6'} is damaged, now 6.damaged: " in warning
    assert "from step 4 in" in said
    assert {child.name for child in (workdir / "checkpoints").iterdir()} == {"4", "6", "6.damaged"}
    np.testing.assert_array_equal(*([line["loss"] for line in read_metrics(one)] for one in (whole, workdir)))


def _flip_a_bit(step):
    """One bit of the largest array, where the file stores it."""
    file = max((step / "params").rglob("d/*"), key=lambda one: one.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_a_flipped_bit_is_noticed_by_whoever_reads_the_arrays(whole, tmp_path):
    """Placed on devices, as `evaluate` and `generate` do; and read by layer, as `convert` does."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    _flip_a_bit(workdir / "checkpoints" / "6")
    source = open_source(str(workdir))
    with pytest.raises(UserError, match=r"checkpoints/6: is damaged"):
        open_model(Config(mesh=MeshConfig(data=1)), source).place()
    with pytest.raises(UserError, match=r"checkpoints/6: is damaged"):
        jax.tree.map(np.asarray, dict(source.leaves(source.own.paths)))


def test_placed_and_stored_arrays_have_the_same_checksums(whole):
    """The sums of files read by layer are those that the run took of its placed arrays."""
    source = open_source(str(whole))
    written = read_meta(absolute(str(whole)), 6).checksums
    assert set(written) == set(source.own.paths)
    for path, leaf in source.own.stored().items():
        parts = leaf if leaf.stacked else (np.asarray(leaf),)
        assert [checksum(part) for part in parts] == written[path]
        assert checksums({path: jnp.asarray(leaf)}) == {path: written[path]}


def test_a_stray_folder_is_no_checkpoint(data, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "checkpoints" / "12").mkdir()
    train(tiny.config(data, **OPTIONS), absolute(str(workdir)))
    assert "from step 6 in" in capsys.readouterr().err


def test_without_a_whole_checkpoint_the_run_does_not_begin_anew(data, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in (4, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "params")
    with pytest.raises(UserError, match=r"none of its 2 checkpoints is whole; they are kept as STEP.damaged"):
        train(tiny.config(data, **OPTIONS), absolute(str(workdir)))


def test_what_a_kill_left_beyond_those_to_keep_is_deleted_at_the_next_start(data, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for stray in (1, 2, 3):
        shutil.copytree(workdir / "checkpoints" / "4", workdir / "checkpoints" / str(stray))
    train(tiny.config(data, **OPTIONS), absolute(str(workdir)))
    assert {child.name for child in (workdir / "checkpoints").iterdir()} == {"4", "6"}


def test_too_little_space_is_told_before_the_first_step(data, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"0.0 MiB are free, the next checkpoint needs 1.\d; free some space or choose"):
        train(tiny.config(data, **OPTIONS), absolute(str(tmp_path)))
    assert read_metrics(tmp_path) == [] if (tmp_path / "metrics.jsonl").exists() else True
    assert not list(tmp_path.rglob("checkpoints/[0-9]*"))


@pytest.mark.parametrize("tasks", [True, False], ids=["evaluated", "not evaluated"])
@pytest.mark.parametrize("optimizer", [{"learning_rate": 1e38}, {"weight_decay": 1e38}], ids=str)
def test_a_model_that_overflows_though_its_parameters_are_finite_is_not_saved(data, tmp_path, optimizer, tasks):
    """The first update is finite, what the model makes of it is not: nothing but a step to come would show it."""
    options = {"optimizer": optimizer, "train": {"steps": 2}, "checkpoint": {"every": 2}}
    with pytest.raises(UserError, match=r"the model gives (NaN or Inf|a loss of).*lower optimizer.learning_rate"):
        train(tiny.config(data, **options, **({} if tasks else {"evaluation": {"tasks": ()}})), absolute(str(tmp_path)))
    assert not list(tmp_path.glob("checkpoints/[0-9]*"))


def test_what_is_advised_against_an_update_that_is_not_finite_can_help(data, tmp_path):
    """Adam divides 0 by 0 for parameters without a gradient, whatever the learning rate is."""
    config = tiny.config(data, optimizer={"eps": 0.0}, **{**OPTIONS, "train": {"steps": 2}})
    with pytest.raises(UserError, match=r"not one of 2 steps could be applied.*; raise optimizer.eps, which is 0"):
        train(config, absolute(str(tmp_path)))


@pytest.mark.parametrize(
    ("optimizer", "bad"),
    [({"weight_decay": 1e39, "warmup_fraction": 0.0}, [1, 2]), ({"learning_rate": 1e39, "clip_norm": None}, [1, 2])],
    ids=["weight decay", "learning rate"],
)
def test_an_update_that_overflows_is_never_applied(data, tmp_path, optimizer, bad):
    """Loss and gradient are finite in the first step; what overflows float32 is the update."""
    config = tiny.config(data, optimizer=optimizer, **{**OPTIONS, "train": {"steps": 2}})
    with pytest.raises(UserError, match=r"not one of 2 steps could be applied"):
        train(config, absolute(str(tmp_path)))
    events = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == bad
    assert np.isfinite(float(events[0]["loss"]))
    assert np.isfinite(float(events[0]["grad_norm"]))
