"""The grid and the queue: what is run, what is left out, and that seeds that train together are what they are alone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mole_jax import cli
from mole_jax.config import AdapterConfig, Config, DataConfig, DomainConfig, MeshConfig, TaskConfig
from mole_jax.errors import UserError
from mole_jax.model.architecture import PRESETS
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.study import runner
from mole_jax.study.config import Section, Study, arms, equal_parameters, plain
from mole_jax.synthetic.domains import DOMAINS
from mole_jax.training.telemetry import read_metrics
from mole_jax.weights.open import open_source, place
from mole_jax.weights.run import Meta, write_params
from mole_jax.weights.sources import RandomSource
from tests import tiny

ALL = ("vision", "projector", "decoder")
MOLE = AdapterConfig(experts=2, rank=2, alpha=4.0, dropout=0.1)


UNTESTED = Section(
    "main",
    {"m": {"other": 1.0}},
    {"LoRA": plain(MOLE)},
    run=Config(data=DataConfig(domains=(DomainConfig("other", "other.json"),))),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds data/ and base/, a run's folder with random weights."""
    folder = tmp_path_factory.mktemp("study")
    tiny.write_data(folder / "data")
    arch, none = PRESETS["tiny"], AdapterConfig(kind="none")
    source, spec = RandomSource(arch, 0), ModelSpec.of(arch, none)
    leaves = place(spec, source, make_mesh(MeshConfig(data=1)), ALL, "float32", 0)
    meta = Meta(arch, none, ALL, None, None, None, source.content_hash(), 0)
    write_params(epath.Path(folder / "base"), leaves, meta)
    return folder


def study(folder, **changes) -> Study:
    tasks = tuple(TaskConfig(name, str(folder / "data" / name / "test.json")) for name in DOMAINS)
    run = tiny.config(
        folder / "data",
        model={"base": str(folder / "base"), "preset": None},
        train={"batch_rows": 4, "trainable": ("adapters", "router")},
        evaluation={"generate": False, "at_start": False, "batch_size": 8, "tasks": tasks},
    )
    mixtures = {"alone": {"general": 1.0}, "mix": {"general": 1.0, "document": 0.5}}
    main = Section("main", mixtures, {"LoRA": plain(MOLE), "MoLE": MOLE})
    settings = {"unit_steps": 4, "seeds": (3, 5), "sections": (main,), "baseline": "LoRA", "together": 2}
    return Study(name="tiny", run=run, **settings | changes)


def evaluation(workdir, slug, seed):
    (file,) = (workdir / "runs" / slug / f"seed_{seed}" / "eval").glob("step_*.json")
    return json.loads(file.read_text())


def test_the_grid_sets_steps_weights_and_groups(folder):
    grid = {arm.name: arm for arm in arms(study(folder))}
    assert list(grid) == ["alone / LoRA", "alone / MoLE", "mix / LoRA", "mix / MoLE"]
    assert [arm.config.train.steps for arm in grid.values()] == [4, 4, 6, 6]
    assert [domain.weight for domain in grid["mix / LoRA"].config.data.domains] == [1.0, 0.5, 0.0]
    assert grid["mix / LoRA"].config.train.trainable == ("adapters",)
    assert grid["mix / MoLE"].with_seed(9).seed == 9


def test_an_arm_of_two_sections_comes_once(folder):
    first = study(folder).sections[0]
    again = Section("again", {"mix": first.mixtures["mix"]}, {"MoLE": MOLE})
    grid = arms(study(folder, sections=(first, again)))
    assert len(grid) == 4
    assert grid[-1].sections == ("main", "again")


def test_equal_parameters_are_equal():
    arch = PRESETS["vicuna-7b"]
    mole = AdapterConfig(experts=3, rank=32)
    sizes = [
        sum(
            leaf.size
            for path, leaf in ModelSpec.of(arch, adapter).declarations.items()
            if "/adapter/" in path and "router" not in path
        )
        for adapter in (mole, equal_parameters(mole, arch.decoder))
    ]
    assert equal_parameters(mole, arch.decoder).rank == 69  # docs/method.md, "Sizes"
    assert abs(sizes[1] / sizes[0] - 1) < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "Lora"}, r"baseline 'Lora' is no adapter, did you mean 'LoRA'"),
        (
            {"comparisons": (("mix / MoLE", "mixed / LoRA"),)},
            r"no arm is named 'mixed / LoRA', did you mean 'mix / LoRA'",
        ),
        ({"seeds": ()}, r"seeds is empty"),
        ({"sections": (Section("main", {"m": {"generl": 1}}, {"LoRA": plain(MOLE)}),)}, r"no domain 'generl'"),
        (
            {"sections": (Section("main", {"m": {"general": 1}}, {"LoRA": AdapterConfig(kind="lora", rank=0)}),)},
            r"arm 'm / LoRA': config: adapter\.rank is 0",
        ),
        ({"together": 0}, r"together 0"),
        ({"sections": (UNTESTED,)}, r"domain 'other' has no task of its name"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(folder, changes, message):
    with pytest.raises(UserError, match=message):
        arms(study(folder, **changes))


SHIPPED = {"study": "runs/study/base", "study_choice": "runs/study/base", "study_real": "runs/study_real/base"}


@pytest.mark.parametrize(("name", "base"), SHIPPED.items())
def test_the_shipped_studies_have_a_grid(name, base, monkeypatch):
    """Every line of docs/study.md that starts one names its file; what it would run passes every check."""
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.syspath_prepend(str(tiny.ROOT))
    lines = re.findall(r"mole_jax\.study --config (\S+)", (tiny.ROOT / "docs" / "study.md").read_text())
    assert f"configs/{name}.py" in lines
    shipped = cli.execute(f"configs/{name}.py", "get_study", Study)
    grid = arms(shipped)
    assert {arm.config.model.base for arm in grid} == {base}
    assert max(arm.config.train.steps for arm in grid) >= 3 * shipped.unit_steps


@pytest.mark.slow
def test_the_shipped_study_makes_its_base_and_data_from_nothing(tmp_path, monkeypatch):
    """Two steps of each pretraining in place of thousands; all else as `configs/study.py` does it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tiny.ROOT))
    from configs import study as shipped
    from configs import study_base, study_questions

    for module, get_config in ((study_base, study_base.get_config), (study_questions, study_questions.get_config)):
        config = get_config()
        short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
        monkeypatch.setattr(module, "get_config", lambda short=short: short)
    shipped.prepare((0.5,), shipped.DATA_SEED)
    source = open_source(str(tmp_path / "runs" / "study" / "base"))
    assert (source.step, source.adapter.kind) == (2, "none")
    assert Path(source.tokenizer or "", "tokenizer.model").exists()
    (arm,) = [arm for arm in arms(shipped.get_study()) if arm.name == "general / LoRA r=4"]
    for path in (arm.config.data.domains[0].path, arm.config.evaluation.tasks[0].path):
        assert Path(path).exists()


@pytest.mark.slow
def test_seeds_train_together_as_they_do_alone(folder, tmp_path):
    """Losses, gradient norms, expert use and held-out results; what each leaves can be opened as any run can."""
    both, alone = epath.Path(tmp_path / "both"), epath.Path(tmp_path / "alone")
    section = Section("main", {"mix": {"general": 1.0, "document": 0.5}}, {"MoLE": MOLE})
    one = study(folder, sections=(section,), baseline="MoLE")
    runner.run(one, both)
    runner.run(dataclasses.replace(one, together=1), alone)
    for seed in one.seeds:
        found, expected = (
            {line["step"]: line for line in read_metrics(workdir / "runs" / "mix_mole" / f"seed_{seed}")}
            for workdir in (both, alone)
        )
        assert sorted(expected) == [1, 2, 3, 4, 5, 6]
        assert sorted(found) == [2, 3, 4, 5, 6]  # the first one compiles and is not in the speed
        for step, line in found.items():
            for name in ("loss", "grad_norm", "balance_loss", "router/use/general/expert0"):
                np.testing.assert_allclose(line[name], expected[step][name], rtol=2e-4, err_msg=f"{step} {name}")
        a, b = (evaluation(workdir, "mix_mole", seed) for workdir in (both, alone))
        assert a["tasks"].keys() == b["tasks"].keys() == set(DOMAINS)
        for name, task in a["tasks"].items():
            np.testing.assert_allclose(task["loss"], b["tasks"][name]["loss"], rtol=1e-4)
            assert task["exact"] == b["tasks"][name]["exact"]
    assert evaluation(both, "mix_mole", 3) != evaluation(both, "mix_mole", 5)
    source = open_source(str(both / "runs" / "mix_mole" / "seed_3"))
    assert (source.adapter, source.seed) == (MOLE, 3)


def test_what_is_done_is_left_alone_and_parts_share_the_arms(folder, tmp_path):
    section = dataclasses.replace(study(folder).sections[0], adapters={"LoRA": plain(MOLE)})
    workdir, whole = epath.Path(tmp_path / "w"), study(folder, unit_steps=2, sections=(section,))
    runner.run(whole, workdir, part=1, parts=2)
    done = {path.parent.parent.parent.name for path in workdir.glob("runs/*/seed_*/eval/step_*.json")}
    assert done == {"mix_lora"}
    before = {path: path.stat().mtime for path in workdir.glob("runs/*/seed_*/eval/step_*.json")}
    gone = next(iter(before))
    gone.unlink()
    runner.run(whole, workdir, part=1, parts=2)
    after = {path: path.stat().mtime for path in workdir.glob("runs/*/seed_*/eval/step_*.json")}
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == [gone]


@pytest.mark.slow
def test_the_door_runs_and_reports(folder, tmp_path):
    config = tmp_path / "study.py"
    config.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT)!r})\n"
        "from pathlib import Path\nfrom tests.study import test_runner\n"
        f"def get_study():\n    return test_runner.study(Path({str(folder)!r}), unit_steps=2)\n"
    )
    line = [sys.executable, "-m", "mole_jax.study", "--config", str(config), "--workdir", str(tmp_path / "w")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": tiny.CHILD_FLAGS}

    def door(*more, **variables):
        return subprocess.run(
            [*line, *more], env=environment | variables, cwd=tiny.ROOT, capture_output=True, text=True, check=False
        )

    slices = {"MEGASCALE_SLICE_ID": "1", "MEGASCALE_NUM_SLICES": "4"}
    first = door(**slices)
    assert first.returncode == 0, first.stderr
    assert "1 of 1: alone / MoLE" in first.stderr
    assert "6 of 8 runs are missing" in (tmp_path / "w" / "report.md").read_text()
    wrong = door("--part", "4/4")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: --part 4/4")
