"""Seeds that train together are what they are alone, and follow the rules of a run that trains alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from etils import epath

from mole_jax.errors import UserError
from mole_jax.study import runner
from mole_jax.study.config import Section, plain
from mole_jax.synthetic.domains import DOMAINS
from mole_jax.training.telemetry import read_metrics
from mole_jax.weights.open import open_source
from tests.study.small import MOLE, evaluation, study

EVERYTHING = {
    "train": {"accumulation": 2},
    "evaluation": {"at_start": True, "every": 3, "generate": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("run", [{}, EVERYTHING], ids=["as shipped", "all that a run can do"])
def test_seeds_train_together_as_they_do_alone(materials, tmp_path, run):
    """Losses, gradient norms, expert use and held-out results; what each leaves can be opened as any run can."""
    both, alone = epath.Path(tmp_path / "both"), epath.Path(tmp_path / "alone")
    section = Section("main", {"mix": {"general": 1.0, "document": 0.5}}, {"MoLE": MOLE})
    one = study(materials, sections=(section,), baseline="MoLE", run=run)
    runner.run(one, both)
    runner.run(dataclasses.replace(one, together=1), alone)
    for seed in one.seeds:
        folders = [workdir / "runs" / "mix_mole" / f"seed_{seed}" for workdir in (both, alone)]
        found, expected = map(read_metrics, folders)
        assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
        for line, other in zip(found, expected, strict=True):
            assert line.keys() == other.keys()
            for name in ("loss", "grad_norm", "balance_loss", "router/use/general/expert0"):
                np.testing.assert_allclose(line[name], other[name], rtol=2e-4, err_msg=f"{line['step']} {name}")
        a, b = (evaluation(workdir, "mix_mole", seed) for workdir in (both, alone))
        assert a["tasks"].keys() == b["tasks"].keys() == set(DOMAINS)
        for name, task in a["tasks"].items():
            np.testing.assert_allclose(task["loss"], b["tasks"][name]["loss"], rtol=1e-4)
            assert task["exact"] == b["tasks"][name]["exact"]
        for name in ("trainable.json", "data_report.json"):
            assert json.loads((folders[0] / name).read_text()) == json.loads((folders[1] / name).read_text()), name
        # The page of a run is made of these on demand.
        left = [{path.name for path in folder.iterdir()} for folder in folders]
        results = [sorted(path.name for path in (folder / "eval").glob("step_*")) for folder in folders]
        assert results[0] == results[1]
        assert left[1] - left[0] <= {"report.html", "plots"}
        assert left[0] <= left[1]
    assert evaluation(both, "mix_mole", 3) != evaluation(both, "mix_mole", 5)
    source = open_source(str(both / "runs" / "mix_mole" / "seed_3"))
    assert (source.adapter, source.seed) == (MOLE, 3)


@pytest.mark.slow
def test_too_many_bad_steps_in_a_row_stop_the_seeds_and_name_the_records(materials, tmp_path, capsys):
    """A learning rate of 1e30 makes the second step's loss infinite or NaN; the run has more steps than are waited."""
    section = Section("main", {"alone": {"general": 1.0}}, {"LoRA": plain(MOLE)})
    wild = {"optimizer": {"learning_rate": 1e30, "clip_norm": None}, "train": {"max_bad_steps": 3}}
    one = study(materials, sections=(section,), unit_steps=20, run=wild)
    with pytest.raises(
        UserError, match=r"3 steps in a row up to step [4-6] gave a NaN or Inf .*seed_3/bad_steps.jsonl"
    ):
        runner.run(one, epath.Path(tmp_path))
    folder = tmp_path / "runs" / "alone_lora" / "seed_3"
    events = [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]
    assert len(events) >= 3
    assert {record.split("/")[0] for event in events for record in event["records"]} == {"general"}
    assert f"seed 3: step {events[0]['step']}: loss " in capsys.readouterr().err
    assert {row["group"] for row in json.loads((folder / "trainable.json").read_text())} == {"adapters"}
    assert not list(folder.glob("eval/*")), "it does not count as done"
    with pytest.raises(UserError, match=r"3 steps in a row up to step (\d+) gave a NaN or Inf") as again:
        runner.run(one, epath.Path(tmp_path))
    assert int(re.findall(r"up to step (\d+)", str(again.value))[0]) >= events[-1]["step"] + 3, "it goes on behind them"


def test_a_killed_study_goes_on_where_all_its_seeds_are(materials, tmp_path):
    """Killed after the checkpoints of step 2, or between them, where all begin anew: the bits are the same."""
    section = Section("main", {"alone": {"general": 1.0}}, {"LoRA": plain(MOLE)})
    one = study(materials, sections=(section,), run={"checkpoint": {"every": 2}})
    runner.run(one, epath.Path(tmp_path / "whole"))
    expected = {seed: losses(tmp_path / "whole", seed) for seed in one.seeds}
    for name in ("killed", "apart"):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
        for seed in one.seeds:
            run = folder / "runs" / "alone_lora" / f"seed_{seed}"
            shutil.rmtree(run / "eval")
            shutil.rmtree(run / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "apart" / "runs" / "alone_lora" / "seed_5" / "checkpoints" / "2")
    for name in ("killed", "apart"):
        runner.run(one, epath.Path(tmp_path / name))
        for seed in one.seeds:
            np.testing.assert_array_equal(losses(tmp_path / name, seed), expected[seed], err_msg=f"{name} {seed}")
            assert evaluation(tmp_path / name, "alone_lora", seed) == evaluation(tmp_path / "whole", "alone_lora", seed)


def losses(workdir, seed):
    return [line["loss"] for line in read_metrics(workdir / "runs" / "alone_lora" / f"seed_{seed}")]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"mesh": {"data": 2}}, r"on one device, the mesh has 2; set mesh\.data 1"),
        ({"model": {"base": None, "preset": "tiny"}}, r"a base that they share; give model\.base"),
        ({"train": {"trainable": ("projector",)}}, r"the base lacks .*adapter.*, which does not train"),
    ],
)
def test_seeds_that_cannot_share_are_refused(materials, tmp_path, run, message):
    with pytest.raises(UserError, match=message):
        runner.run(study(materials, run=run), epath.Path(tmp_path))
