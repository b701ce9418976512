"""Domains of three layouts through one mixture, and held-out records of another."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from mole_jax.config import DataConfig, DomainConfig, TaskConfig
from mole_jax.data.held_out import questions
from mole_jax.data.load import RecordProblem
from mole_jax.data.mixture import Mixture
from tests.data.domains_on_disk import IMAGE, record, write, write_image
from tests.data.layouts import fixtures


@pytest.fixture
def domains(tmp_path):
    """The same four questions and images thrice: as LLaVA has them, as messages, as columns."""
    names = [write_image(tmp_path, f"{i}.png") for i in range(4)]
    asked = [(f"Which is {i}?", f"Number {i}.", name) for i, name in enumerate(names)]
    chats = [
        {
            "id": str(i),
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ],
            "images": [image],
        }
        for i, (question, answer, image) in enumerate(asked)
    ]
    columns = [{"id": i, "frage": q, "answer": a, "image": image} for i, (q, a, image) in enumerate(asked)]
    return (
        DomainConfig("llava", write(tmp_path, "llava", [record(str(i), *one) for i, one in enumerate(asked)])),
        DomainConfig("messages", write(tmp_path, "messages", chats)),
        DomainConfig("columns", write(tmp_path, "columns", columns), columns=("question=frage",)),
    )


def test_three_layouts_give_the_same_examples(domains, tokenizer):
    data = DataConfig(domains=domains, sequence_length=300, examples_per_row=1, mix="size")
    mixture = Mixture.build(data, seed=0, tokenizer=tokenizer, image=IMAGE, rows=4, epochs=1.0)
    assert [source.layout.name for source in mixture.loader.sources] == ["llava", "messages", "question_answer"]
    rows = {}
    for _ in range(3):
        batch = next(mixture)
        for i, ids in enumerate(batch.record_ids):
            rows[ids[0]] = (batch.tokens[i], batch.images[i])
    mixture.close()
    assert len(rows) == 12
    assert not mixture.skipped
    for number in range(4):
        first, *others = (rows[f"{domain.name}/{number}"] for domain in domains)
        for other in others:
            for ours, theirs in zip(first, other, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_a_missing_image_is_told_by_the_field_of_the_file(domains, tmp_path, tokenizer):
    (tmp_path / "2.png").unlink()
    renamed = dataclasses.replace(domains[2], columns=("question=frage", "answer=answer"))
    for domain, field in ((domains[1], "images"), (renamed, "image")):
        mixture = Mixture.build(
            DataConfig(domains=(domain,), sequence_length=300), seed=0, tokenizer=tokenizer, image=IMAGE, rows=1
        )
        with pytest.raises(RecordProblem, match=rf"record 2 \(id '2'\), field {field}: image '2.png' does not exist"):
            mixture.loader.load(0, 2)


def test_held_out_questions_know_all_right_answers(tmp_path, tokenizer):
    write_image(tmp_path, "a.png")
    raw = {"imgname": "a.png", "query": "Is it red?", "label": ["14", 14.5]}
    (tmp_path / "chart.json").write_text(json.dumps([raw]))
    data = DataConfig(sequence_length=300)
    asked = questions(TaskConfig("t", str(tmp_path / "chart.json")), data, tokenizer=tokenizer, image=IMAGE)
    assert asked.listed[0].references == ("14", "14.5")
    assert asked.listed[0].text == fixtures.ASKED
    assert len(asked[0].images) == 1
