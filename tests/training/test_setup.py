"""The check that a workdir holds the run that is started: what may differ, and files of other versions."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest

from mole_jax.config_json import to_json
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.training.setup import check_same_run, count_steps
from tests import tiny


@pytest.fixture
def begun(tmp_path):
    """A folder in which a run of the config has evaluated; returns both."""
    config = tiny.config(tmp_path / "data")
    (tmp_path / "eval").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    return absolute(str(tmp_path)), config


def test_the_same_run_goes_on_and_another_is_refused(begun):
    folder, config = begun
    check_same_run(folder, config)
    check_same_run(folder, dataclasses.replace(config, name="other"))
    with pytest.raises(UserError, match="holds a run whose seed is 0, the config has 1; put it back"):
        check_same_run(folder, dataclasses.replace(config, seed=1))


def test_a_field_that_came_later_counts_as_its_default(begun):
    folder, config = begun
    values = json.loads((folder / "config.json").read_text())
    del values["adapter"]["domain_weight"]
    (folder / "config.json").write_text(json.dumps(values))
    check_same_run(folder, config)
    later = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, domain_weight=0.5))
    with pytest.raises(UserError, match=r"holds a run whose adapter.domain_weight is 0.0, the config has 0.5"):
        check_same_run(folder, later)


def test_a_file_that_was_cut_off_is_told_in_one_line(begun):
    folder, config = begun
    whole = (folder / "config.json").read_text()
    (folder / "config.json").write_text(whole[:40])
    with pytest.raises(UserError, match=r"config.json: cannot be read as JSON .*; put the run's own back") as caught:
        check_same_run(folder, config)
    assert "\n" not in str(caught.value)


def test_a_count_that_was_cut_off_names_its_remedy(tmp_path):
    config = tiny.config(tmp_path / "data", train={"steps": None, "epochs": 1.0})
    (tmp_path / "epoch.json").write_text('{"steps": 1')
    with pytest.raises(UserError, match=r"epoch.json: cannot be read as JSON .*; remove it, and the steps are counted"):
        count_steps(config, types.SimpleNamespace(content={}), absolute(str(tmp_path)))
