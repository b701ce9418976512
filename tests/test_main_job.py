"""The main job's outcome: on the run that `make quickstart` leaves, and on real data."""

from __future__ import annotations

import json

import pytest

from mole_jax import cli
from mole_jax.files import absolute
from mole_jax.training.loop import train
from tests.tiny import ROOT


def tasks(workdir, step):
    return json.loads((workdir / "eval" / f"step_{step:08d}.json").read_text())["tasks"]


def test_quickstart_scores_rise_in_every_domain():
    workdir = ROOT / "runs" / "quickstart" / "mole"
    if not (workdir / "report.html").exists():
        pytest.skip("needs the quickstart's run: `make quickstart` first")
    steps = json.loads((workdir / "config.json").read_text())["train"]["steps"]
    before, after = tasks(workdir, 0), tasks(workdir, steps)
    assert set(after) == {"general", "document", "biomedical"}
    for name, task in after.items():
        assert task["interval"][0] > before[name]["interval"][1], f"{name}: the intervals of before and after overlap"
        assert task["loss"] < before[name]["loss"] / 2, name


@pytest.mark.slow
def test_real_data_losses_fall_in_every_domain(shared, tmp_path):
    """configs/real_mix.py on the real pictures and questions, shortened."""
    flags = [
        "--train.epochs",
        "None",
        "--train.steps",
        "40",
        "--evaluation.generate",
        "False",
        "--evaluation.every",
        "None",
    ]
    for i, name in enumerate(("general", "document", "biomedical")):
        folder = shared / "data" / name
        flags += [f"--data.domains.{i}.path", str(folder / "train.json")]
        flags += [f"--evaluation.tasks.{i}.path", str(folder / "test.json")]
    flags += ["--model.tokenizer", str(shared / "models" / "llama_tokenizer")]
    train(cli.load_config(str(ROOT / "configs" / "real_mix.py"), flags), absolute(str(tmp_path)))
    before, after = tasks(tmp_path, 0), tasks(tmp_path, 40)
    for name, task in after.items():
        assert task["loss"] < 0.8 * before[name]["loss"], name
