"""`train --dry-run`: what a run would do, with nothing trained and nothing written."""

from __future__ import annotations

import re

import pytest

from tests import tiny
from tests.chaos import doors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def test_it_tells_shapes_memory_and_the_first_examples_and_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny.write_config(tmp_path / "config.py", data)
    before = set(tmp_path.rglob("*"))
    said = doors.here("train", "--config", config, "--dry-run", "--workdir", tmp_path / "run")
    assert said.status == 0, said
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before
    assert re.search(r"^tokens +8 x 96 +int32$", said.out, re.MULTILINE)
    assert re.search(r"^images +8 x 2 x 28 x 28 x 3 +uint8$", said.out, re.MULTILINE)
    assert "records looked at: no record is left out" in said.out
    assert said.out.count("⟦") == 2
    sizes = dict(re.findall(r"^([a-z ]+?) +([\d.,]+) MiB$", said.out, re.MULTILINE))
    found = re.search(r"^ +all +([\d,]+)$", said.out, re.MULTILINE)
    assert found
    numbers = int(found[1].replace(",", ""))
    assert float(sizes["trainable parameters"]) == round(numbers * 4 / 2**20, 1)
    assert float(sizes["one device"]) > sum(float(sizes[name]) for name in ("frozen", "optimizer", "batch"))


def test_what_training_would_refuse_is_refused(data, tmp_path):
    config = tiny.write_config(tmp_path / "config.py", data)
    refused = doors.here("train", "--config", config, "--dry-run", "--mesh.fsdp", "3", "--mesh.data", "1")
    assert "train.batch_rows 8 does not divide over" in refused.line
    assert "--workdir: is missing" in doors.here("train", "--config", config).line
