"""A run folder of an earlier version (tests/goldens/old_run) is resumed as if nothing had changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from mole_jax.files import absolute
from mole_jax.training.loop import train
from mole_jax.training.telemetry import read_metrics
from tests import tiny


def test_an_old_run_goes_on_to_the_metrics_that_its_own_version_wrote(goldens, tmp_path, monkeypatch):
    """Its last two steps: equal to rounding, since another processor may add in another order."""
    old = goldens / "old_run"
    monkeypatch.chdir(tmp_path)
    tiny.write_data(Path("data"))
    shutil.copytree(tiny.TOKENIZER, "tokenizer")
    shutil.copytree(old / "run", "run")
    config = tiny.config(Path("data"), model={"tokenizer": "tokenizer"}, checkpoint={"every": 2, "keep_last": 3})
    train(config, absolute("run"))
    found, expected = read_metrics("run"), read_metrics(old)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "loss/general", "balance_loss", "grad_norm", "learning_rate", "router/entropy/layer1"):
        ours, theirs = ([line[name] for line in lines] for lines in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)
    report = json.loads(Path("run/data_report.json").read_text())
    assert {name: one["examples"] for name, one in report["domains"].items()}.keys() == {
        "general",
        "document",
        "biomedical",
    }
    assert json.loads(Path("run/eval/step_00000006.json").read_text())["step"] == 6
