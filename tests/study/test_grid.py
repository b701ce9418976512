"""The grid: steps, weights and groups of every arm, what is refused, and `study.json` there and back."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from mole_jax import cli
from mole_jax.config import AdapterConfig, Config, DataConfig, DomainConfig
from mole_jax.errors import UserError
from mole_jax.model.architecture import PRESETS
from mole_jax.model.spec import ModelSpec
from mole_jax.study.config import Curve, Section, Study, equal_parameters, plain
from mole_jax.study.grid import Grid, lay_out
from tests import tiny
from tests.study.small import MOLE, study

UNTESTED = Section(
    "main",
    {"m": {"other": 1.0}},
    {"LoRA": plain(MOLE)},
    run=Config(data=DataConfig(domains=(DomainConfig("other", "other.json"),))),
)


def test_the_grid_sets_steps_weights_and_groups(materials):
    grid, configs = lay_out(study(materials))
    assert [arm.name for arm in grid.arms] == ["alone / LoRA", "alone / MoLE", "mix / LoRA", "mix / MoLE"]
    assert [arm.steps for arm in grid.arms] == [config.train.steps for config in configs.values()] == [4, 4, 6, 6]
    assert [domain.weight for domain in configs["mix / LoRA"].data.domains] == [1.0, 0.5, 0.0]
    assert configs["mix / LoRA"].train.trainable == ("adapters",)
    assert {config.seed for config in configs.values()} == {3}


def test_an_arm_of_two_sections_comes_once(materials):
    first = study(materials).sections[0]
    again = Section("again", {"mix": first.mixtures["mix"]}, {"MoLE": MOLE})
    grid, _ = lay_out(study(materials, sections=(first, again)))
    assert len(grid.arms) == 4
    assert grid.arms[-1].sections == ("main", "again")
    assert grid.section("again") == (grid.arm("mix / MoLE"),)


def test_what_is_written_is_what_is_read(materials):
    own = dict.fromkeys(("general", "document", "biomedical"), "alone / LoRA")
    curve = Curve("degree", "conflict", ((0.0, "mix / LoRA", own), (1.0, "mix / MoLE", own)))
    pairs = (("mix / MoLE", "mix / LoRA"),)
    grid, _ = lay_out(study(materials, comparisons=pairs, curves=(curve,)))
    counted = dataclasses.replace(grid, arms=tuple(dataclasses.replace(arm, trainable=7) for arm in grid.arms))
    assert Grid.from_json(json.loads(json.dumps(counted.to_json()))) == counted


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
        (
            {"curves": (Curve("degree", "conflict", ((0.5, "mix / LoRA", {"general": "alone / LoRA"}),)),)},
            r"curve 'degree' at 0\.5 needs one arm for each domain alone",
        ),
        ({"seeds": ()}, r"seeds is empty"),
        ({"sections": (Section("main", {"m": {"generl": 1}}, {"LoRA": plain(MOLE)}),)}, r"no domain 'generl'"),
        (
            {"sections": (Section("main", {"m": {"general": 1}}, {"LoRA": AdapterConfig(kind="lora", rank=0)}),)},
            r"arm 'm / LoRA': config: adapter\.rank is 0",
        ),
        (
            {"sections": (Section("main", {"m": {"general": 1}}, {"LoRA": plain(MOLE), "lora": MOLE}),)},
            r"two arms differ only in signs that folders' names leave out",
        ),
        ({"together": 0}, r"together 0"),
        ({"sections": (UNTESTED,)}, r"domain 'other' has no task of its name"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(materials, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        lay_out(study(materials, **changes))
    assert str(caught.value).startswith("study: ")


SHIPPED = {"study": "runs/study/base", "study_choice": "runs/study/base", "study_real": "runs/study_real/base"}


@pytest.mark.parametrize(("name", "base"), SHIPPED.items())
def test_the_shipped_studies_have_a_grid(name, base, monkeypatch):
    """Every line of docs/study.md that starts one names its file; what it would run passes every check."""
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.syspath_prepend(str(tiny.ROOT))
    lines = re.findall(r"mole_jax\.study --config (\S+)", (tiny.ROOT / "docs" / "study.md").read_text())
    assert f"configs/{name}.py" in lines
    shipped = cli.execute(f"configs/{name}.py", "get_study", Study)
    grid, configs = lay_out(shipped)
    assert {config.model.base for config in configs.values()} == {base}
    assert shipped.bases[-1].workdir == base
    assert max(arm.steps for arm in grid.arms) >= 3 * shipped.unit_steps
