"""A run goes on only with what it began with: data, held-out data, tokenizer, and jax's settings."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import pytest

from mole_jax.config import Config
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.tokenizer import Tokenizer
from mole_jax.training import inputs
from mole_jax.training.loop import train
from mole_jax.weights.open import open_source
from tests import tiny


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Two of four steps, as after a kill: the data's folder and the run's."""
    folder = tmp_path_factory.mktemp("begun")
    tiny.write_data(folder / "data")
    train(_config(folder, 4), absolute(str(folder / "run")))
    shutil.rmtree(folder / "run" / "checkpoints" / "4")
    return folder


def _config(folder: Path, steps: int):
    evaluation = {"tasks": tiny.config(folder / "data").evaluation.tasks[:1], "generate": False}
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        shutil.copytree(tiny.TOKENIZER, tokenizer)
    model = {"tokenizer": str(tokenizer)}
    return tiny.config(folder / "data", train={"steps": steps}, evaluation=evaluation, model=model)


@pytest.fixture
def copy(begun, tmp_path, monkeypatch):
    """A copy that tests may change, under the paths that the run knows."""
    shutil.copytree(begun, tmp_path / "kept")
    yield begun
    shutil.rmtree(begun)
    shutil.copytree(tmp_path / "kept", begun)


def _resume(folder: Path) -> None:
    train(_config(folder, 4), absolute(str(folder / "run")))


def _edit(file: Path) -> None:
    text = file.read_text()
    records = json.loads(text)
    turn = records[0]["conversations"][-1]
    turn["value"] = turn["value"][::-1] + "x"
    file.write_text(json.dumps(records))


def test_unchanged_it_goes_on(copy, capsys):
    _resume(copy)
    assert "is not known" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("data/general/train.json", "data state: the records of domain general have changed since the checkpoint"),
        ("data/general/test.json", "holds a run whose held-out data of task general was records of hash"),
    ],
)
def test_other_data_are_refused(copy, file, message):
    _edit(copy / file)
    with pytest.raises(UserError, match=message) as caught:
        _resume(copy)
    assert "\n" not in str(caught.value)


def test_another_picture_is_refused(copy):
    file = next((copy / "data" / "general").rglob("*.png"))
    with file.open("ab") as end:
        end.write(b"more")
    with pytest.raises(UserError, match=r"images of (hash|domain general)"):
        _resume(copy)


def test_another_tokenizer_is_refused(copy):
    with (copy / "tokenizer" / "tokenizer.model").open("ab") as file:
        file.write(b"\x12\x00")  # another, empty setting of its trainer
    with pytest.raises(UserError, match="holds a run whose tokenizer was"):
        _resume(copy)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json"])
def test_another_text_file_beside_the_tokenizer_is_refused(copy, name):
    """One that has come, and one that was there and has changed."""
    file = copy / "tokenizer" / name
    there = file.exists()
    with file.open("ab") as end:
        end.write(b" " if there else b"{}")
    before = r"'\w{16}'" if there else "'absent'"
    with pytest.raises(UserError, match=rf"holds a run whose {name} was {before} and is '\w{{16}}' now; put it back"):
        _resume(copy)


def test_the_processors_files_of_the_base_count(goldens):
    base = open_source(str(goldens / "families" / "llava_onevision"))
    found = inputs.look(Config(), Tokenizer.load(base.tokenizer), base)
    for name in ("chat_template.jinja", "processor_config.json", "generation_config.json"):
        there = goldens / "families" / "llava_onevision" / name
        assert found[name] == hashlib.sha256(there.read_bytes()).hexdigest()[:16], name
    assert found["special_tokens_map.json"] == "absent"


def test_a_run_that_never_heard_of_these_files_goes_on_with_a_word(copy, capsys):
    file = copy / "run" / "inputs.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: one for name, one in known.items() if not name.endswith((".json", ".jinja"))}))
    _resume(copy)
    assert "an older version wrote it; whether tokenizer.json or tokenizer_config.json or " in capsys.readouterr().err
    assert json.loads(file.read_text()) == known


@pytest.mark.parametrize(("name", "value"), [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)])
def test_another_setting_of_jax_is_refused(copy, name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(UserError, match=f"holds a run whose {name} was {before!r} and is {value!r} now"):
            _resume(copy)
    finally:
        jax.config.update(name, before)


def test_a_run_of_before_goes_on_with_a_word(copy, capsys):
    (copy / "run" / "inputs.json").unlink()
    _resume(copy)
    assert (
        "inputs.json: is not there (older versions wrote none); whether held-out data or tokenizer changed is not known"
        in capsys.readouterr().err
    )
    assert (copy / "run" / "inputs.json").exists()


def test_data_may_change_before_anything_is_saved(copy, tmp_path):
    shutil.rmtree(copy / "run" / "checkpoints")
    _edit(copy / "data/general/train.json")
    _resume(copy)
