"""The file of answers that an evaluation goes on from after a kill."""

from __future__ import annotations

import json

import pytest
from etils import epath

from mole_jax.errors import UserError
from mole_jax.evaluation.answers import Answers

PINS = {"weights": "abc", "suffix": "", "decoding": {"temperature": 0.0, "stop": ["\n"]}}


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "step_00000000" / "docs.partial.jsonl"


def begun(path, texts):
    answers = Answers(path, PINS, strict=True)
    answers.add([f"id{i}" for i in range(len(texts))], texts)
    return answers


def test_answers_are_on_disk_when_add_returns(path):
    begun(path, ["yes", "zwei\nZeilen ä"])
    header, *lines = path.read_text().splitlines()
    assert json.loads(header) == {"pins": PINS}
    assert [json.loads(line) for line in lines] == [
        {"id": "id0", "prediction": "yes"},
        {"id": "id1", "prediction": "zwei\nZeilen ä"},
    ]


def test_another_process_goes_on(path):
    begun(path, ["yes"]).add(["id1"], ["no"])
    again = Answers(path, PINS, strict=True)
    assert again.texts == ["yes", "no"]
    again.add(["id2"], ["maybe"])
    assert Answers(path, PINS, strict=True).texts == ["yes", "no", "maybe"]


@pytest.mark.parametrize("left", range(2, 30, 4))
def test_a_line_that_was_cut_short_is_asked_again(path, left):
    begun(path, ["yes", "no", "it is a dog"])
    whole = path.read_text()
    path.write_text(whole[:-left])
    again = Answers(path, PINS, strict=True)
    assert again.texts == ["yes", "no"]
    again.add(["id2"], ["it is a dog"])
    assert path.read_text() == whole


def test_a_line_that_lacks_its_end_alone_is_kept(path):
    begun(path, ["yes", "no"])
    whole = path.read_text()
    path.write_text(whole[:-1])
    assert Answers(path, PINS, strict=True).texts == ["yes", "no"]
    assert path.read_text() == whole


def test_a_cut_header_begins_anew(path):
    begun(path, [])
    path.write_text(path.read_text()[:10])
    assert Answers(path, PINS, strict=True).texts == []
    assert json.loads(path.read_text()) == {"pins": PINS}


def test_other_settings_are_refused_by_name_or_begin_anew(path):
    begun(path, ["yes"])
    other = PINS | {"suffix": "\nBriefly."}
    with pytest.raises(UserError, match=r"whose suffix was '', it is now '\\nBriefly.'; .* another --workdir"):
        Answers(path, other, strict=True)
    assert Answers(path, PINS, strict=True).texts == ["yes"], "a refusal leaves the file as it was"
    assert Answers(path, other, strict=False).texts == []
    assert Answers(path, other, strict=True).texts == []


def test_a_file_of_another_kind_is_left_alone(path):
    path.parent.mkdir(parents=True)
    path.write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match=r"line 1 is not as it was written \(pins is missing\); .* move the file away"):
        Answers(path, PINS, strict=False)
    assert path.read_text() == '{"id": "a"}\n'
