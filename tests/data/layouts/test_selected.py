"""Records under the names of a layout, and those of them that are kept."""

from __future__ import annotations

import pickle

import pytest

from mole_jax.config import Config, DataConfig, DomainConfig, EvaluationConfig, ModelConfig, TaskConfig, TrainConfig
from mole_jax.config_check import check
from mole_jax.config_json import from_json, to_json
from mole_jax.data.fingerprint import fingerprint
from mole_jax.data.load import RecordSource
from mole_jax.data.records import parse_record
from mole_jax.errors import UserError
from tests.data.layouts.test_layouts import write

SLAKE = [
    {"img_name": f"x{i}/source.jpg", "question": f"q{i}", "answer": "a", "q_lang": "zh" if i % 3 else "en", "n": i % 2}
    for i in range(6)
]
FRAGEN = [{"Frage": "What?", "Antwort": "This.", "Bild": "a.png", "q": 1}, {"Frage": "Who?", "Antwort": "", "Bild": 3}]
COLUMNS = ("question=Frage", "answer=Antwort", "image=Bild")


def example(source, index):
    return parse_record(source.records[index], domain="d", **source.where(index))


def test_columns_name_what_the_file_calls_otherwise(tmp_path):
    source = RecordSource.open(DomainConfig("d", write(tmp_path, FRAGEN), columns=COLUMNS))
    assert source.layout.name == "question_answer"
    found = example(source, 0)
    assert [turn.text for turn in found.turns] == ["<image>\nWhat?", "This."]
    assert found.images == ("a.png",)
    assert list(source.records.values()) == [source.records[0], source.records[1]]


def test_messages_name_the_field_as_the_file_does(tmp_path):
    source = RecordSource.open(DomainConfig("d", write(tmp_path, FRAGEN), columns=COLUMNS))
    with pytest.raises(UserError, match=r"record 1 \(id '1'\), field Bild of layout question_answer: expected a path"):
        example(source, 1)


def test_where_keeps_some_and_says_how_many(tmp_path):
    path = write(tmp_path, SLAKE)
    source = RecordSource.open(DomainConfig("d", path, where=("q_lang=en",)))
    assert source.remark == "d: layout slake (by its keys), 2 of 6 records kept by where"
    sent = pickle.loads(pickle.dumps(source))
    assert [example(sent, i).turns[0].text for i in range(len(sent.records))] == ["<image>\nq0", "<image>\nq3"]
    assert [record["question"] for record in sent.records.values()] == ["q0", "q3"]
    assert example(sent, 1).id == "3"  # where it stands in the file
    both = RecordSource.open(TaskConfig("d", path, where=("q_lang=zh", "n=1")))
    assert [record["question"] for record in both.records.values()] == ["q1", "q5"]


def test_a_message_counts_records_as_the_file_does(tmp_path):
    records = [*SLAKE[:4], {**SLAKE[4], "q_lang": "en", "answer": None}]
    source = RecordSource.open(DomainConfig("d", write(tmp_path, records), where=("q_lang=en",)))
    with pytest.raises(UserError, match=r"d\.jsonl: record 4 \(id '4'\), field answer of layout slake: missing"):
        example(source, 2)


def test_other_records_are_other_data(tmp_path):
    path = write(tmp_path, SLAKE)
    settings = ({}, {"where": ("q_lang=en",)}, {"where": ("q_lang=zh",)}, {"columns": ("caption=q_lang",)})
    found = [fingerprint(RecordSource.open(DomainConfig("d", path, **one)))["records"] for one in settings]
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"columns": ("question=frage",)}, r"has no field 'frage', which columns names for question, did you mean 'Fr"),
        ({"columns": ("question=zzz",)}, r"has no field 'zzz', .*; it has Antwort, Bild, Frage, q"),
        ({"where": ("lang=en",)}, r"has no field 'lang', which where names"),
        ({"where": ("q=2",)}, r"where q=2 keeps none of its records; q has 1"),
    ],
)
def test_a_name_or_value_that_no_record_has_is_refused(tmp_path, settings, told):
    with pytest.raises(UserError, match=rf"^domain d: .*d\.jsonl: {told}") as caught:
        RecordSource.open(DomainConfig("d", write(tmp_path, FRAGEN), **settings))
    assert "\n" not in str(caught.value)


def _config(**fields) -> Config:
    return Config(
        model=ModelConfig(preset="tiny", tokenizer="t"),
        data=DataConfig(domains=(DomainConfig("d", "a.json", **fields),)),
        train=TrainConfig(steps=1),
        evaluation=EvaluationConfig(tasks=(TaskConfig("d", "a.json", **fields),)),
    )


def test_the_settings_go_through_json():
    config = _config(layout="slake", columns=("a=b",), where=("q_lang=en",))
    assert from_json(to_json(config)) == check(config)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"columns": ("question",)}, "data.domains: d has 'question' in columns, expected ours=theirs"),
        ({"columns": ("=x",)}, "d has '=x' in columns"),
        ({"where": ("q_lang=",)}, "d has 'q_lang=' in where, expected field=value"),
        ({"columns": ("a=b", "a=c")}, "d has columns that name twice"),
    ],
)
def test_pairs_of_another_form_are_refused(fields, told):
    with pytest.raises(UserError, match=told):
        check(_config(**fields))


def test_an_unknown_layout_is_answered_with_the_nearest():
    with pytest.raises(
        UserError, match=r"data\.domains\.0\.layout expects one of ureader, .*, did you mean 'sharegpt'"
    ):
        from_json({"data": {"domains": [{"name": "d", "path": "a", "layout": "share_gpt"}]}})
