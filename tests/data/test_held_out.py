"""Held-out batches drop nothing, and questions keep the last answer back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mole_jax.config import DataConfig, DomainConfig, TaskConfig
from mole_jax.data.conversation import encode
from mole_jax.data.held_out import held_out_batches, questions
from mole_jax.data.records import parse_record
from mole_jax.errors import UserError
from mole_jax.prompts import PROMPTS
from tests.data.domains_on_disk import IMAGE, domain, record, write, write_image

DATA = DataConfig(
    domains=(DomainConfig("other", "-"), DomainConfig("photos", "-")), sequence_length=300, tiles_per_row=2
)


@pytest.fixture
def task(tmp_path) -> TaskConfig:
    return TaskConfig("photos", domain(tmp_path, "photos", 5).path)


def _batches(task, tokenizer, rows=2, data=DATA, **processes):
    return held_out_batches(task, data, tokenizer=tokenizer, rows=rows, image=IMAGE, **processes)


def test_one_pass_in_order_with_empty_rows_at_the_end(task, tokenizer):
    held_out = _batches(task, tokenizer)
    for _ in range(2):
        batches = list(held_out)
        assert len(batches) == len(held_out) == 3
        assert [row for batch in batches for row in batch.record_ids] == [[f"photos/photos{i}"] for i in range(5)] + [
            []
        ]
    for batch in batches:
        assert {name: array.shape for name, array in batch.arrays().items()} == {
            name: (2, 300) for name in ("tokens", "targets", "loss_mask", "positions", "segment_ids", "domain_ids")
        } | {"images": (2, 2, 8, 8, 3)}
        real = batch.segment_ids > 0
        assert (batch.domain_ids[real] == 1).all()
        assert (batch.tokens[~real] == tokenizer.pad_id).all()
    last = batches[-1]
    assert not last.segment_ids[1].any()
    assert not last.loss_mask[1].any()
    assert not last.images[1].any()


def test_a_row_is_the_encoded_example(tmp_path, tokenizer):
    raw = record("a", "What?", "A dog.", write_image(tmp_path, "a.png", (9, 8, 7)))
    task = TaskConfig("photos", write(tmp_path, "t", [raw]))
    (batch,) = _batches(task, tokenizer, rows=1)
    example = parse_record(raw, file="t", index=0, domain="photos")
    one = encode(example, tokenizer, PROMPTS["v1"], IMAGE)
    size = len(one.tokens)
    np.testing.assert_array_equal(batch.tokens[0, :size], one.tokens)
    np.testing.assert_array_equal(batch.targets[0, : size - 1], one.tokens[1:])
    np.testing.assert_array_equal(batch.loss_mask[0, : size - 1], one.loss_mask[1:])
    assert batch.loss_mask.sum() == one.loss_mask.sum()
    assert batch.segment_ids.sum() == size
    assert batch.images[0, 0, 4, 4].tolist() == [9, 8, 7]


def test_processes_have_the_same_number_of_batches_and_share_the_records(task, tokenizer):
    parts = [_batches(task, tokenizer, rows=1, process_index=p, process_count=2) for p in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    names = [[name for batch in part for name in batch.record_ids[0]] for part in parts]
    assert names == [["photos/photos0", "photos/photos2", "photos/photos4"], ["photos/photos1", "photos/photos3"]]


def test_batches_of_all_processes_put_together_are_those_of_one(task, tokenizer):
    whole = [batch.record_ids for batch in _batches(task, tokenizer, rows=4)]
    parts = [_batches(task, tokenizer, rows=2, process_index=p, process_count=2) for p in range(2)]
    assert [a.record_ids + b.record_ids for a, b in zip(*parts, strict=True)] == whole


def test_the_limit_is_respected(task, tokenizer):
    limited = dataclasses.replace(task, limit=3)
    assert sum(len(batch.record_ids[i]) for batch in _batches(limited, tokenizer) for i in range(2)) == 3
    assert len(list(questions(limited, DATA, tokenizer=tokenizer, image=IMAGE))) == 3


def test_a_long_record_leaves_an_empty_row_or_stops(tmp_path, tokenizer):
    path = write(tmp_path, "t", [record("a"), record("b", answer="x" * 2000), record("c")])
    task = TaskConfig("photos", path)
    held_out = _batches(task, tokenizer, rows=3)
    (batch,) = held_out
    assert batch.record_ids == [["photos/a"], [], ["photos/c"]]
    assert [text.partition(": ")[0] for text in held_out.skipped["too long"]] == ["photos/b"]
    with pytest.raises(UserError, match=r"t\.json: record 1 \(id 'b'\): \d+ tokens, over data\.sequence_length 300"):
        list(_batches(task, tokenizer, data=dataclasses.replace(DATA, on_too_long="error")))


def test_a_question_keeps_earlier_turns_and_holds_the_last_answer_back(tmp_path, tokenizer):
    raw = record("a", "What?", "A dog.", write_image(tmp_path, "a.png", (9, 8, 7)))
    raw["conversations"] += [{"from": "human", "value": "Its colour?"}, {"from": "gpt", "value": "Brown."}]
    task = TaskConfig("photos", write(tmp_path, "t", [raw]))
    (question,) = questions(task, DATA, tokenizer=tokenizer, image=IMAGE)
    assert (question.id, question.references) == ("a", ("Brown.",))
    text = tokenizer.decode(question.tokens)
    assert text.endswith("Its colour? ASSISTANT:")
    assert "ASSISTANT: A dog." in text
    assert "Brown" not in text
    assert (question.tokens == IMAGE.token_id).sum() == 3
    assert question.images.shape == (1, 8, 8, 3)


def test_an_unusable_question_stops_even_where_training_would_skip(tmp_path, tokenizer):
    task = TaskConfig("photos", write(tmp_path, "t", [record("a", image="none.png")]))
    data = dataclasses.replace(DATA, on_bad_record="skip")
    with pytest.raises(UserError, match=r"t\.json: record 0 \(id 'a'\), field image: image 'none\.png' does not exist"):
        list(questions(task, data, tokenizer=tokenizer, image=IMAGE))


def test_a_suffix_goes_after_the_last_question(tmp_path, tokenizer):
    raw = record("a", "What?", "A dog.", write_image(tmp_path, "a.png", (9, 8, 7)))
    raw["conversations"] += [{"from": "human", "value": "Its colour?"}, {"from": "gpt", "value": "Brown."}]
    task = TaskConfig("photos", write(tmp_path, "t", [raw]), suffix="\nOne word.")
    (question,) = questions(task, DATA, tokenizer=tokenizer, image=IMAGE)
    assert tokenizer.decode(question.tokens).endswith("Its colour?\nOne word. ASSISTANT:")
    with pytest.raises(UserError, match=r"task photos: the prompt preset plain shows the model no question"):
        questions(task, dataclasses.replace(DATA, prompt="plain"), tokenizer=tokenizer, image=IMAGE)


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        (["brown", "dark brown"], ("brown", "dark brown")),
        ([{"answer": "brown", "answer_confidence": "yes", "answer_id": 1}, {"answer": "red"}], ("brown", "red")),
        (None, ("Brown.",)),
    ],
)
def test_a_record_may_have_several_answers(tmp_path, tokenizer, answers, references):
    raw = record("a", "Its colour?", "Brown.") | ({} if answers is None else {"answers": answers})
    task = TaskConfig("photos", write(tmp_path, "t", [raw]))
    (question,) = questions(task, DATA, tokenizer=tokenizer, image=IMAGE)
    assert question.references == references


def test_half_a_character_in_an_answer_is_refused(tmp_path, tokenizer):
    task = TaskConfig("photos", write(tmp_path, "t", [record("a") | {"answers": ["red", "\ud83d"]}]))
    with pytest.raises(UserError, match=r"record 0 \(id 'a'\), field answers: character 0 is the lone surrogate"):
        questions(task, DATA, tokenizer=tokenizer, image=IMAGE)


@pytest.mark.parametrize("answers", [[], "brown", [1], [{"text": "brown"}], ["brown", None], {"answer": "brown"}])
def test_answers_of_another_kind_are_refused(tmp_path, tokenizer, answers):
    task = TaskConfig("photos", write(tmp_path, "t", [record("a") | {"answers": answers}]))
    with pytest.raises(UserError, match=r"t\.json: record 0 \(id 'a'\), field answers: expected a list of texts"):
        questions(task, DATA, tokenizer=tokenizer, image=IMAGE)


def test_the_hash_is_of_what_is_asked_and_what_is_right(tmp_path, tokenizer):
    raw = record("a", "Its colour?", "Brown.")

    def hash_of(*records):
        task = TaskConfig("photos", write(tmp_path, "t", list(records)))
        return questions(task, DATA, tokenizer=tokenizer, image=IMAGE).sha256

    first = hash_of(raw)
    assert hash_of(raw | {"source": "elsewhere"}) == first
    others = [
        hash_of(record("b", "Its colour?", "Brown.")),
        hash_of(record("a", "Its size?", "Brown.")),
        hash_of(record("a", "Its colour?", "Red.")),
        hash_of(raw | {"answers": ["Brown.", "Red."]}),
        hash_of(record("a", "Its colour?", "Brown.", write_image(tmp_path, "a.png", (9, 8, 7)))),
        hash_of(raw, raw),
    ]
    assert len({first, *others}) == 7
