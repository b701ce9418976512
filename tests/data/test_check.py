"""Validation lists every problem, and the preview marks what is supervised."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data.desk import check, show
from mole_jax.data.desk.opened import open_loader
from tests.data.domains_on_disk import IMAGE, domain, record, write, write_image


@pytest.fixture
def data(tmp_path) -> DataConfig:
    greeted = record("greeted")
    greeted["conversations"].insert(0, {"from": "gpt", "value": "Hello"})
    records = [record("a"), greeted, record("b", image="none.png"), {"id": "c"}, record("d", answer="x" * 2000)]
    domains = (domain(tmp_path, "photos", 3), DomainConfig("faulty", write(tmp_path, "faulty", records), weight=3.0))
    return DataConfig(domains=domains, sequence_length=300)


def test_every_problem_is_listed_with_file_record_and_field(data, tokenizer):
    inspection = check.inspect(data, open_loader(data, tokenizer, IMAGE))
    assert [problem.reason for problem in inspection.problems] == ["bad image", "bad record", "too long"]
    texts = [str(problem) for problem in inspection.problems]
    assert "faulty.json: record 2 (id 'b'), field image: image 'none.png' does not exist" in texts[0]
    assert "faulty.json: record 3 (id 'c'), field conversations: missing" in texts[1]
    assert "faulty.json: record 4 (id 'd'): " in texts[2]
    photos, faulty = inspection.domains
    assert (photos.records, photos.usable, photos.images, photos.share) == (3, 3, 3, 0.25)
    assert (faulty.records, faulty.usable, faulty.images, faulty.turns_dropped) == (5, 2, 0, 1)
    assert inspection.examples_per_epoch == 8
    assert inspection.stops
    printed = str(inspection)
    assert printed.endswith("3 problem(s)")
    assert all(text in printed for text in texts)


def test_counts_are_those_of_the_examples(data, tokenizer):
    loader = open_loader(data, tokenizer, IMAGE)
    counts = check.inspect(data, loader).domains[0]
    loaded = [loader.load(0, i) for i in range(3)]
    assert counts.tokens == sum(len(one.tokens) for one in loaded)
    assert counts.supervised_tokens == sum(one.supervised.sum() for one in loaded)
    assert counts.longest == max(len(one.tokens) for one in loaded)


def test_a_sound_mixture_has_no_problems(data, tokenizer):
    sound = dataclasses.replace(data, domains=data.domains[:1])
    inspection = check.inspect(sound, open_loader(sound, tokenizer, IMAGE))
    assert (inspection.problems, inspection.stops) == ((), False)
    assert str(inspection).endswith("no problems")


def test_the_preview_marks_the_answers(tmp_path, tokenizer):
    raw = record("a", "What?", "A dog.", write_image(tmp_path, "a.png"))
    raw["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "A cat."}]
    data = DataConfig(domains=(DomainConfig("d", write(tmp_path, "d", [raw])),), sequence_length=500)
    loader = open_loader(data, tokenizer, IMAGE)
    first, second = show.preview(data, loader, 2, seed=0)
    assert first == second
    assert first.startswith("d/a: ")
    marked = [part.partition("⟧")[0] for part in first.split("⟦")[1:]]
    assert [text.lstrip() for text in marked] == ["A dog.</s>", "A cat.</s>"]
    assert "<image: 3 positions>" in first


def test_a_preview_of_nothing_usable_ends(tmp_path, tokenizer):
    path = write(tmp_path, "d", [{"id": "a"}])
    data = DataConfig(domains=(DomainConfig("d", path),))
    assert list(show.preview(data, open_loader(data, tokenizer, IMAGE), 3, seed=0)) == []


def test_the_command_prints_and_ends_with_2_where_there_is_a_problem(tmp_path, data, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    config = tmp_path / "config.py"
    config.write_text(
        "from mole_jax.config import *\n\n\ndef get_config():\n"
        f"    data = DataConfig(domains={data.domains!r}, sequence_length=300)\n"
        f"    model = ModelConfig(preset='tiny', tokenizer={str(tmp_path / 'tokenizer')!r})\n"
        "    return Config(model=model, data=data, train=TrainConfig(steps=1))\n"
    )
    command = [sys.executable, "-m", "mole_jax.data", "--config", str(config), "--preview", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "3 problem(s)" in done.stdout
    assert "⟦" in done.stdout
    assert "Traceback" not in done.stderr
