"""A run says at its start and its end what is left out of its data, and stops where that is too much."""

from __future__ import annotations

import json

import pytest

from mole_jax.config import DomainConfig, TaskConfig
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.training.loop import train
from mole_jax.training.telemetry import read_metrics
from tests import tiny
from tests.data.domains_on_disk import record, write


@pytest.fixture
def domains(tmp_path):
    long = [record(f"l{i}", answer="blue " * 300) for i in range(9)]
    return (DomainConfig("d", write(tmp_path, "d", [record("ok"), *long])),)


def test_both_ends_of_a_run_and_its_evaluation_say_it(domains, tmp_path, capsys):
    task = TaskConfig("held", domains[0].path)
    config = tiny.config(
        tmp_path,
        data={"domains": domains},
        train={"steps": 2},
        evaluation={"tasks": (task,), "generate": False},
        adapter={"experts": 2},
    )
    train(config, absolute(str(tmp_path / "run")))
    told = capsys.readouterr().err.splitlines()
    left_out = "10 records are left out (90.0%): 9 too long"
    assert "data: d: layout llava (by its keys)" in told
    assert f"records looked at: d: 9 of {left_out}" in told
    assert f"records read: d: 9 of {left_out}" in told
    assert told.count(f"step 0: held: 9 of {left_out}") == told.count(f"step 2: held: 9 of {left_out}") == 1
    result = json.loads((tmp_path / "run" / "eval" / "step_00000002.json").read_text())
    assert result["tasks"]["held"]["skipped"] == {"too long": 9}
    assert result["tasks"]["held"]["data"] == "held: layout llava (by its keys)"
    page = (tmp_path / "run" / "report.html").read_text()
    assert f'<p class="warning">records left out: d: 9 of {left_out}</p>' in page


def test_too_much_stops_before_the_first_step(domains, tmp_path):
    config = tiny.config(tmp_path, data={"domains": domains, "most_skipped": 0.5}, evaluation={"tasks": ()})
    with pytest.raises(UserError, match=r"domain d: 9 of 10 records are left out .* over data\.most_skipped 0\.5"):
        train(config, absolute(str(tmp_path / "run")))
    assert not read_metrics(tmp_path / "run")


def test_a_cut_picture_is_seen_before_the_first_step(cut, tmp_path, capsys):
    train(
        tiny.config(tmp_path, data=cut, train={"steps": 1}, evaluation={"tasks": ()}), absolute(str(tmp_path / "run"))
    )
    assert "records looked at: d: 4 of 8 records are left out (50.0%): 4 bad image" in capsys.readouterr().err


@pytest.fixture
def cut(tmp_path):
    """Half of the pictures are cut off, which only decoding them shows."""
    from PIL import Image

    Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:1000])
    records = [record(str(i), image="good.png" if i % 2 else "cut.png") for i in range(8)]
    return {"domains": (DomainConfig("d", write(tmp_path, "d", records)),), "on_bad_record": "skip"}


def test_what_a_look_at_the_data_misses_stops_at_a_checkpoint_and_a_higher_limit_resumes(cut, tmp_path, monkeypatch):
    for name in ("SURVEYED", "ENOUGH"):
        monkeypatch.setattr(f"mole_jax.data.mixture.{name}", 0)
    sections = {"train": {"steps": 6}, "evaluation": {"tasks": ()}}
    strict = tiny.config(tmp_path, data={**cut, "most_skipped": 0.4}, **sections)
    with pytest.raises(UserError, match=r"domain d: 4 of 8 records are left out \(50\.0%\): 4 bad image"):
        train(strict, absolute(str(tmp_path / "run")))
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == "2"
    train(tiny.config(tmp_path, data={**cut, "most_skipped": 0.5}, **sections), absolute(str(tmp_path / "run")))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
