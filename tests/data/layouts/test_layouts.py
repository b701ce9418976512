"""Every layout, in its authors' form, is told by its keys and read to the same examples; others by columns."""

from __future__ import annotations

import json
import pickle
import typing
from typing import Any

import pytest

from mole_jax.config import DomainConfig, LayoutName
from mole_jax.data.layouts.table import LAYOUTS, UNKNOWN, recognised
from mole_jax.data.load import RecordSource
from mole_jax.data.records import parse_record
from mole_jax.errors import UserError
from tests.data.layouts import fixtures

SHIPPED = pytest.mark.parametrize("shipped", fixtures.LAYOUTS)


def parsed(raw: dict[str, Any], layout: str):
    example = parse_record(raw, file="d.json", index=0, domain="d", layout=LAYOUTS[layout])
    return [(turn.role, turn.text) for turn in example.turns], example.images


def write(folder, records) -> str:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_config_names_the_layouts_that_there_are():
    assert typing.get_args(LayoutName) == tuple(LAYOUTS)
    assert {layout for layout, _ in fixtures.LAYOUTS.values()} == set(LAYOUTS)


@SHIPPED
def test_records_are_recognised_and_mean_what_they_say(shipped):
    layout, pairs = fixtures.LAYOUTS[shipped]
    assert recognised(record for record, _ in pairs).name == layout
    for record, meant in pairs:
        assert parsed(record, layout) == meant


@pytest.mark.parametrize("shipped", [one for one in fixtures.LAYOUTS if one != "ChartQA of the hub"])  # bytes alone
def test_a_domain_of_each_is_opened_by_its_keys_and_by_name(tmp_path, shipped):
    layout, pairs = fixtures.LAYOUTS[shipped]
    records = [(record, meant) for record, meant in pairs if _is_json(record)]
    path = write(tmp_path, [record for record, _ in records])
    found = RecordSource.open(DomainConfig("d", path))
    assert found.layout is LAYOUTS[layout]
    assert found.remark == f"d: layout {layout} (by its keys)"
    forced = RecordSource.open(DomainConfig("d", path, layout=layout))  # type: ignore[arg-type]
    assert forced.layout is LAYOUTS[layout]
    assert forced.remark == f"d: layout {layout}"
    sent = pickle.loads(pickle.dumps(found))
    for index, (_, meant) in enumerate(records):
        example = parse_record(sent.records[index], domain="d", **sent.where(index))
        assert ([(turn.role, turn.text) for turn in example.turns], example.images) == meant


def _is_json(record: Any) -> bool:
    try:
        json.dumps(record)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("off", [{"loss": False}, {"weight": 0}], ids=["ms-swift", "OpenAI"])
def test_an_answer_that_is_context_alone_says_so(off):
    answers = [{"role": "assistant", "content": "a", **off}, {"role": "assistant", "content": "b", "loss": True}]
    ask = {"role": "user", "content": "q", "weight": None}
    example = parse_record(
        {"messages": [ask, answers[0], ask, answers[1]]}, file="d.json", index=0, domain="d", layout=LAYOUTS["messages"]
    )
    assert [turn.supervised for turn in example.turns] == [True, False, True, True]


def test_several_right_answers_are_references():
    def fail(field, problem):
        return UserError(f"{field}: {problem}")

    of_chart = LAYOUTS["chartqa"].references
    assert of_chart({"query": "q", "label": ["14", 14.5]}, fail) == ("14", "14.5")
    assert of_chart({"query": "q", "label": "14"}, fail) is None
    of_caption = LAYOUTS["caption"].references
    assert of_caption({"image": "a", "caption": ["A dog.", "Its tail."]}, fail) == ("A dog.", "Its tail.")
    assert of_caption({"image": "a", "caption": "A dog."}, fail) is None
    vqa = {"question": "q", "answers": [{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}]}
    assert LAYOUTS["question_answer"].references(vqa, fail) == ("red", "blue")
    for of_list, record in ((of_chart, {"label": []}), (of_caption, {"caption": []})):
        with pytest.raises(UserError, match="the list is empty"):
            of_list(record, fail)


TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]


def test_records_of_text_alone_do_not_hide_the_layout_of_the_others():
    text, image = {"conversations": TURNS}, {"conversations": TURNS, "images": ["a.png"]}
    assert recognised([text]).name == "llava"
    assert recognised([text, image]).name == recognised([image, text]).name == "sharegpt"
    assert recognised([None, 3, {"broken": 1}, text]).name == "llava"
    assert recognised([{"conversations": TURNS, "image": "a.png"}, image]).name == "sharegpt"


def test_a_file_of_two_layouts_is_refused_and_can_be_forced(tmp_path):
    path = write(tmp_path, [{"conversations": TURNS}, {"messages": CHAT}])
    with pytest.raises(UserError, match=r"domain d: .*d\.jsonl: has records of two layouts, llava and messages; write"):
        RecordSource.open(DomainConfig("d", path))
    assert RecordSource.open(DomainConfig("d", path, layout="llava")).layout is LAYOUTS["llava"]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            {"id": 4, "Frage": "q", "answr": "a"},
            r"field question: missing; is of no known layout: it has the keys id, Frage, answr. The nearest is ",
        ),
        (
            {"questions": "q", "answer": "a"},
            r"The nearest is question_answer \(question, answer\): .*set columns, such as question=questions",
        ),
        ({"conversation": []}, r"field conversations: missing; .* rename them, or set columns, such as conversations="),
        ({"x": 1}, r"field \(all\): is of no known layout: it has the keys x; name them with columns, and one of"),
        ({}, r"it has no keys"),
        ({f"k{i}": 1 for i in range(40)}, r"k11, …"),
    ],
)
def test_a_record_of_no_known_layout_is_told_its_keys_and_the_nearest(tmp_path, record, told):
    source = RecordSource.open(DomainConfig("d", write(tmp_path, [record])))
    assert source.layout is UNKNOWN
    with pytest.raises(UserError, match=rf"d\.jsonl: record 0 .*{told}") as caught:
        parse_record(source.records[0], domain="d", **source.where(0))
    assert "\n" not in str(caught.value)
