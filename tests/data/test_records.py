"""Records on disk, and every way in which one can be malformed."""

from __future__ import annotations

import pathlib
import pickle
import subprocess
import sys

import pytest

from mole_jax.config import DomainConfig
from mole_jax.data.containers.open import image_root, open_records
from mole_jax.data.conversation import Turn
from mole_jax.data.load import RecordSource
from mole_jax.data.records import parse_record
from mole_jax.errors import UserError
from tests.data.domains_on_disk import record, write


def test_the_image_folder_is_the_files_unless_given():
    assert image_root("a/b/train.json", None) == str(pathlib.Path("a/b"))
    assert image_root("a/b/train.json", "c") == "c"
    assert image_root("tfds:x:train", None) is None


def _parse(raw):
    return parse_record(raw, file="train.json", index=7, domain="photos")


def test_a_record_becomes_an_example():
    example = _parse({**record("a", "Which?", "This.", ["x.png", "y.png"]), "licence": "CC0"})
    assert (example.id, example.domain, example.images) == ("a", "photos", ("x.png", "y.png"))
    assert example.turns == (Turn("user", "<image>\n<image>\nWhich?"), Turn("assistant", "This."))


@pytest.mark.parametrize(
    ("identity", "found"), [(5, "5"), (1.5, "1.5"), (None, "7"), (float("nan"), "7"), (float("inf"), "inf"), ("", "")]
)
def test_id_may_be_a_number_or_null(identity, found):
    assert _parse({**record("a"), "id": identity}).id == found


def test_id_may_be_absent():
    without = record("a")
    del without["id"]
    assert _parse(without).id == "7"


def test_a_leading_assistant_turn_is_left_out():
    raw = record("a")
    raw["conversations"].insert(0, {"from": "gpt", "value": "Hello!"})
    assert _parse(raw) == _parse(record("a"))


def test_both_names_of_a_role_are_known():
    raw = record("a")
    raw["conversations"][0]["from"], raw["conversations"][1]["from"] = "user", "assistant"
    assert _parse(raw) == _parse(record("a"))


def _with(change) -> dict:
    raw = record("a", image="x.png")
    change(raw)
    return raw


def _turn(i: int, **fields):
    return _with(lambda raw: raw["conversations"][i].update(fields))


@pytest.mark.parametrize(
    ("raw", "field", "problem"),
    [
        (_with(lambda raw: raw.pop("conversations")), "conversations", "missing; add the list"),
        (
            _with(lambda raw: raw.update(conversation=raw.pop("conversations"))),
            "conversations",
            "missing; rename 'conversation' to conversations",
        ),
        (_with(lambda raw: raw.update(conversations="text")), "conversations", "expected a list of turns, found text"),
        (_with(lambda raw: raw["conversations"].__setitem__(1, "A dog.")), r"conversations\[1\]", "found text"),
        (_with(lambda raw: raw["conversations"][1].pop("value")), r"conversations\[1\]\.value", "missing"),
        (_turn(1, value=3), r"conversations\[1\]\.value", "expected text, found a number"),
        (_turn(0, **{"from": "humna"}), r"conversations\[0\]\.from", "unknown role 'humna', did you mean 'human'"),
        (_turn(1, **{"from": "human"}), r"conversations\[1\]\.from", "two turns of one side"),
        (_turn(1, value=" \n"), r"conversations\[1\]\.value", "the text is empty"),
        (_turn(1, value="A <image>"), "image", r"1 image\(s\) but 2 <image>"),
        (_with(lambda raw: raw["conversations"].pop()), "conversations", "needs a question and an answer"),
        (
            _with(lambda raw: raw["conversations"].append({"from": "human", "value": "And?"})),
            r"conversations\[2\]\.from",
            "the last turn is the human's",
        ),
        (_turn(0, value="What?"), "image", r"1 image\(s\) but 0 <image> in the text; write one <image>"),
        (_with(lambda raw: raw.pop("image")), "image", r"0 image\(s\) but 1 <image>"),
        (_with(lambda raw: raw.update(image=[])), "image", r"0 image\(s\) but 1 <image>"),
        (_with(lambda raw: raw.update(image=["x.png", "y.png"])), "image", r"2 image\(s\) but 1 <image>"),
        (_with(lambda raw: raw.update(image=3)), "image", "expected a path, found a number"),
        (_with(lambda raw: raw.update(image=["x.png", None])), r"image\[1\]", "expected a path, found null"),
        (_with(lambda raw: raw.update(image="")), "image", "the path is empty"),
    ],
)
def test_a_malformed_record_is_refused_by_file_record_and_field(raw, field, problem):
    with pytest.raises(UserError, match=rf"^train\.json: record 7 \(id 'a'\), field {field}: .*{problem}") as caught:
        _parse(raw)
    assert "\n" not in str(caught.value)


def _conversation(*turns: tuple[str, str]) -> dict:
    return {"id": "a", "conversations": [{"from": side, "value": text} for side, text in turns]}


def test_a_system_turn_may_stand_first():
    found = _parse(_conversation(("system", "Be brief."), ("gpt", "Hello"), ("human", "What?"), ("gpt", "A dog.")))
    assert [(turn.role, turn.text) for turn in found.turns] == [
        ("system", "Be brief."),
        ("user", "What?"),
        ("assistant", "A dog."),
    ]


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ((("human", "What?"), ("system", "Be brief."), ("gpt", "A dog.")), r"conversations\[1\]\.from: a system turn"),
        ((("system", " "), ("human", "What?"), ("gpt", "A dog.")), r"conversations\[0\]\.value: the text is empty"),
        ((("system", "Be brief."), ("human", "What?")), "conversations: needs a question and an answer"),
    ],
)
def test_a_system_turn_elsewhere_empty_or_without_a_question_is_refused(turns, told):
    with pytest.raises(UserError, match=told):
        _parse(_conversation(*turns))


def test_an_answer_with_the_image_is_refused():
    raw = record("a", image="x.png")
    raw["conversations"][0]["value"], raw["conversations"][1]["value"] = "What?", "<image> A dog."
    with pytest.raises(UserError, match="field conversations: <image> stands in an answer"):
        _parse(raw)


LONE = "half \ud83d"


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (_turn(0, value=f"<image>\n{LONE}"), r"conversations\[0\]\.value"),
        (_turn(1, value=LONE), r"conversations\[1\]\.value"),
        (_with(lambda raw: raw.update(image=f"{LONE}.png")), "image"),
        (_with(lambda raw: raw.update(image=["x.png", LONE])), r"image\[1\]"),
    ],
)
def test_a_lone_surrogate_is_told_by_its_place(raw, field):
    with pytest.raises(UserError, match=rf"field {field}: character \d+ is the lone surrogate \\ud83d"):
        _parse(raw)
    with pytest.raises(UserError, match=r"record 7, field id: character 5 is the lone surrogate \\ud83d"):
        _parse({**record("a"), "id": LONE})


def test_a_message_shows_the_beginning_of_a_long_value():
    long = "x" * 10**6
    for raw in ({**record("a"), "id": long, "image": 3}, _turn(1, **{"from": long})):
        with pytest.raises(UserError, match=r"xxx… \(1,000,000 characters\)") as caught:
            _parse(raw)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("raw", "remedy"),
    [
        ({"id": 1, "Question 1": {}}, "missing; add the list of turns"),
        ({"id": 1, "Conversations": []}, "missing; rename 'Conversations' to conversations"),
        ({"id": 1, "messages": []}, "missing; rename messages to conversations, and role and content in it"),
        (record("a") | {"conversations": [{"role": "user", "content": "q"}]}, r"\.from: missing; rename role to from"),
        (record("a") | {"conversations": [{"from": "user", "content": "q"}]}, "missing; rename content to value"),
        (record("a") | {"conversations": [{"speaker": "user"}]}, "missing; a turn is an object with from and value"),
    ],
)
def test_a_hint_says_what_to_rename_to_what(raw, remedy):
    with pytest.raises(UserError, match=remedy):
        _parse(raw)


@pytest.mark.parametrize(("raw", "kind"), [([], "a list"), ("x", "text"), (None, "null")])
def test_a_record_is_an_object(raw, kind):
    with pytest.raises(UserError, match=rf"^train\.json: record 7: expected an object .* found {kind}"):
        _parse(raw)


def test_an_id_of_another_type_is_refused():
    with pytest.raises(UserError, match=r"record 7, field id: expected text or a number, found a list"):
        _parse({**record("a"), "id": []})


PREPARE = """
import json, pathlib, sys
import tensorflow_datasets as tfds

folder, columns = pathlib.Path(sys.argv[1]), sys.argv[2] == "columns"
text = tfds.features.Text()


class Tiny(tfds.core.GeneratorBasedBuilder):
    name = "tiny"
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = folder

    def _info(self):
        turns = tfds.features.Sequence({"from": text, "value": text}) if columns else text
        image = tfds.features.Image(encoding_format="png") if columns else text
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"id": text, "image": image, "conversations": turns})
        )

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, raw in enumerate(json.loads((folder / "records.json").read_text())):
            turns = raw["conversations"] if columns else json.dumps(raw["conversations"])
            image = raw.get("image", "")
            yield i, {"id": raw["id"], "image": str(folder / image) if columns else image, "conversations": turns}


Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.mark.parametrize("form", ["columns", "json"])
def test_a_prepared_tensorflow_datasets_set(tmp_path, monkeypatch, form):
    from tests.data.domains_on_disk import write_image

    raws = [record(f"r{i}", f"Größe {i}?", "A dog.", write_image(tmp_path, f"{i}.png")) for i in range(3)]
    if form == "json":
        raws.append(record("text"))
    write(tmp_path, "records", raws)
    subprocess.run([sys.executable, "-c", PREPARE, str(tmp_path), form], check=True, capture_output=True, timeout=100)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    records = pickle.loads(pickle.dumps(open_records("tfds:tiny:train")))
    found = {}
    for i in range(len(records)):
        example = parse_record(records[i], file=records.file, index=i, domain="d")
        found[example.id] = example
    assert sorted(found) == sorted(raw["id"] for raw in raws)
    for raw in raws:
        example = found[raw["id"]]
        assert [turn.text for turn in example.turns] == [turn["value"] for turn in raw["conversations"]]
        image = raw.get("image")
        expected = (tmp_path / image).read_bytes() if image and form == "columns" else image
        assert example.images == (() if image is None else (expected,))
    with pytest.raises(UserError, match=r"domain d: tfds:tiny:none: cannot be opened in"):
        RecordSource.open(DomainConfig("d", "tfds:tiny:none"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("tfds:tiny", "expected tfds:NAME:SPLIT"), ("tfds:no_such_set:train", "tfds:no_such_set:train: cannot be opened")],
)
def test_a_wrong_tfds_name_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=message):
        RecordSource.open(DomainConfig("d", name))
