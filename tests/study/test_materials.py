"""What a study makes before it runs, and that it leaves alone what is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mole_jax.errors import UserError
from mole_jax.study import materials as made
from mole_jax.study.config import Base, SyntheticData
from mole_jax.study.grid import lay_out
from mole_jax.synthetic import vocabulary
from mole_jax.synthetic.domains import generate, texts
from mole_jax.weights.open import open_source
from tests import tiny
from tests.study import small


def test_data_tokenizer_and_base_are_made_once(materials, tmp_path):
    data = SyntheticData(str(tmp_path / "data"), seed=1, train=4, test=4, disagreement=0.5, captions=8)
    listed = tuple(str(path) for path in sorted(Path(data.folder).glob("*/*.json")))
    assert not listed
    generate(tmp_path / "same", seed=1, train=4, test=4, disagreement=0.5, captions=8)
    listed = tuple(str(path) for path in sorted((tmp_path / "same").glob("*/*.json")))
    config = dataclasses.replace(
        tiny.config(materials / "data", train={"steps": 1}, evaluation={"tasks": ()}),
        model=dataclasses.replace(tiny.config(materials / "data").model, tokenizer=str(tmp_path / "tokenizer")),
    )
    base = Base(config, str(tmp_path / "base"), texts=listed)
    study = small.study(materials, data=(data,), bases=(base,))
    made.make(study)
    assert (tmp_path / "data" / "manifest.json").read_text() == (tmp_path / "same" / "manifest.json").read_text()
    expected = vocabulary.train_tokenizer(texts(tmp_path / "same"), tmp_path / "expected").read_bytes()
    assert (tmp_path / "tokenizer" / "tokenizer.model").read_bytes() == expected
    assert open_source(str(tmp_path / "base")).step == 1
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    made.make(study)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


def test_texts_that_are_not_there_are_named(materials, tmp_path):
    config = tiny.config(materials / "data")
    base = Base(config, str(tmp_path / "base"), texts=(str(tmp_path / "none.json"),))
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        made.make(small.study(materials, bases=(base,)))


@pytest.mark.slow
def test_the_shipped_study_makes_its_base_and_data_from_nothing(tmp_path, monkeypatch):
    """Two steps of each pretraining in place of thousands, one degree; all else as `configs/study.py` has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tiny.ROOT))
    from configs import study as shipped

    whole = shipped.get_study()
    bases = [
        dataclasses.replace(
            one, config=dataclasses.replace(one.config, train=dataclasses.replace(one.config.train, steps=2))
        )
        for one in whole.bases
    ]
    made.make(dataclasses.replace(whole, data=whole.data[1:2], bases=tuple(bases)))
    source = open_source(str(tmp_path / "runs" / "study" / "base"))
    assert (source.step, source.adapter.kind) == (2, "none")
    assert Path(source.tokenizer or "", "tokenizer.model").exists()
    config = lay_out(whole)[1]["general / LoRA r=4"]
    for path in (config.data.domains[0].path, config.evaluation.tasks[0].path):
        assert Path(path).exists()
