"""A finished run that the trials spoil copies of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import tiny
from tests.chaos import doors

OPTIONS = {
    "train": {"steps": 6},
    "checkpoint": {"every": 2, "keep_last": 2, "keep_best": 0},
}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("chaos_data"))


@pytest.fixture(scope="session")
def config(data) -> Path:
    return tiny.write_config(data / "config.py", data, **OPTIONS)


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory) -> Path:
    """A run that nothing happened to, with the checkpoints of steps 4 and 6; not to be changed."""
    workdir = tmp_path_factory.mktemp("chaos_whole") / "run"
    done = doors.here("train", "--config", config, "--workdir", workdir)
    assert done.status == 0, done.err
    return workdir


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of `whole` to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def stopped(copy) -> Path:
    """A copy of `whole` as a kill leaves it that comes between the last evaluation and the last checkpoint."""
    shutil.rmtree(copy / "checkpoints" / "6")
    return copy
