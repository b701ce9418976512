"""More chips by a longer data axis: what is said of them against what they are compiled to send."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from benchmarks.weak_scaling import Point, point, points, steepest, table
from mole_jax.errors import UserError
from mole_jax.model.architecture import preset
from mole_jax.parallel.devices import CHIPS
from mole_jax.parallel.mesh import make_mesh
from mole_jax.planning.compile import abstract_step, compile_step
from mole_jax.planning.predict import Exchange, Prediction, conclude
from tests import tiny

KIND = "TPU v5 lite"
CHIP = CHIPS[KIND]


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[int, Prediction]:
    """The tiny step compiled for 4 and for 8 simulated devices with as many rows each, told to be of a v5e."""
    folder = tmp_path_factory.mktemp("data")
    found = {}
    for devices in (4, 8):
        sections = {"mesh": {"data": -1, "fsdp": 2}, "model": {"remat": "full"}, "train": {"batch_rows": devices}}
        config, arch = tiny.config(folder, **sections), preset("tiny")
        mesh = make_mesh(config.mesh, jax.devices()[:devices])
        facts = compile_step(config, arch, mesh, "cpu", folder)
        step = abstract_step(config, arch, mesh)
        plan = conclude(config, arch, "cpu", step, facts, depths=(2,), compile_seconds=0.0)
        found[devices] = dataclasses.replace(plan, device_kind=KIND, step_seconds=1.0)
    return found


def test_what_eight_devices_send_follows_from_four(plans):
    four, eight = plans[4], plans[8]
    for base in (four, eight):
        same = point(base, base.devices, 1)
        assert same.inside + same.across == pytest.approx(sum(one.sent for one in base.exchanges), rel=1e-3)
        assert (same.between, same.rows) == (0, base.rows)
    guess, told = point(four, 8, 1), point(eight, 8, 1)
    assert (guess.mesh, guess.rows) == (told.mesh, told.rows) == ("data 4, fsdp 2", 8)
    assert guess.inside == pytest.approx(told.inside, rel=0.01)
    assert guess.across == pytest.approx(told.across, rel=0.01)
    assert guess.across > point(four, 4, 1).across


def one_sum(plan: Prediction) -> Prediction:
    """A plan whose only exchange is a sum of 1 GB over data."""
    return dataclasses.replace(plan, exchanges=(Exchange("all-reduce", ("data",), 1, 10**9, 10**9),))


def test_slices_exchange_each_device_s_part_of_the_sum(plans):
    found = point(one_sum(plans[8]), 8, 2)
    # 4 devices of a slice share the sum: each has a quarter, and sends it to the other slice and back, halved twice.
    assert found.across == pytest.approx(2 * 10**9 * 3 / 4)
    assert found.between == pytest.approx(2 * 10**9 / 4 * 1 / 2)
    assert (found.chips, found.slices, found.mesh, found.rows) == (16, 2, "data 8, fsdp 2", 16)
    assert found.exposed == pytest.approx(1.0 + found.across / CHIP.links + found.between / CHIP.slices)
    assert found.hidden == 1.0
    assert point(dataclasses.replace(one_sum(plans[8]), step_seconds=1e-6), 8, 2).hidden == found.between / CHIP.slices


def test_one_copy_of_the_model_sends_nothing_over_data(plans):
    assert point(one_sum(plans[8]), 2, 1).across == 0


def test_chips_that_hold_no_whole_copy_are_refused(plans):
    with pytest.raises(UserError, match="2 devices are one copy"):
        point(plans[8], 3, 1)


def test_the_table_has_a_line_for_each_point(plans):
    found = {"cpu": points(one_sum(plans[8]), (2, 8))}
    assert [one.chips for one in found["cpu"]] == [2, 8, 16, 32]
    assert table(found).count("\n") == 5
    assert "| 1,431 | 238 |" in table(found)
    times = [dataclasses.replace(found["cpu"][0], exposed=exposed) for exposed in (1.0, 1.1)]
    assert isinstance(times[0], Point)
    assert steepest({"cpu": times}) == "cpu 10.0 %"
