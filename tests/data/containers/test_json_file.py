"""JSON and JSONL files, what else is brought in their place, and records that a JSON reader refuses."""

from __future__ import annotations

import json
import pathlib
import pickle
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_jax.config import DomainConfig
from mole_jax.data.containers.json_file import FileRecords, decode
from mole_jax.data.containers.open import open_records
from mole_jax.data.load import RecordSource
from mole_jax.errors import UserError
from tests.data.domains_on_disk import record, write

values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v, max_size=3))
objects = st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(items=objects, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), lines=st.booleans())
def test_every_record_is_found_in_json_and_jsonl(items, indent, ascii_only, lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "records.json"
    if lines:
        text = "\n\r\n".join(json.dumps(item, ensure_ascii=ascii_only) for item in items) + "\n"
    else:
        text = " \r\n" + json.dumps(items, indent=indent, ensure_ascii=ascii_only) + "\n "
    path.write_bytes(text.encode())
    records = pickle.loads(pickle.dumps(FileRecords(path)))
    assert len(records) == len(items)
    assert [records[i] for i in reversed(range(len(items)))] == items[::-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "the file is empty"),
        (b"[]", "has no records"),
        (b'[{"a": 1}, {"a": ]', r"after record 0: not JSON .*column 18"),
        (b'[{"a": 1} {"a": 2}]', "after record 0: not JSON .expected ','"),
        (b'[{"a": 1}', "after record 0: not JSON"),
        (b'[{"a": 1}] x', "after record 0: not JSON .more text"),
        (b"[\xff]", "byte 1 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_list_is_refused(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        RecordSource.open(DomainConfig("photos", str(path)))
    assert str(caught.value).startswith(f"domain photos: {path}: ")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"domain d: .*none\.json: no such file; check the domain's path"):
        RecordSource.open(DomainConfig("d", str(tmp_path / "none.json")))


def test_a_broken_line_is_the_problem_of_its_record_only(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    records = FileRecords(path)
    assert [records[0], records[2]] == [{"a": 1}, {"a": 3}]
    with pytest.raises(UserError, match=r"r\.jsonl: record 1 is not JSON"):
        records[1]


def test_a_file_changed_meanwhile_is_refused(tmp_path):
    path = pathlib.Path(write(tmp_path, "r", [{"a": 1}]))
    records = FileRecords(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="has changed since"):
        records[0]
    path.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        records[0]


RECORDS = [record("a"), record("b", "Größe?", "漢字")]
PRETTY = json.dumps(RECORDS, indent=2, ensure_ascii=False)
LINES = "\r\n".join(json.dumps(one, ensure_ascii=False) for one in RECORDS)


@pytest.mark.parametrize("text", [PRETTY, json.dumps(RECORDS), LINES, "\n \n" + LINES + "\n"])
def test_a_byte_order_mark_changes_nothing(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text, encoding="utf-8-sig")
    records = FileRecords(path)
    assert list(records) == list(records.values()) == RECORDS


def test_the_values_in_order_have_none_for_a_broken_one(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": "ö"}\n')
    assert list(FileRecords(path).values()) == [{"a": 1}, None, {"a": "ö"}]


def test_the_hash_is_of_the_content(tmp_path):
    paths = [write(tmp_path, "a", RECORDS), write(tmp_path, "b", RECORDS), write(tmp_path, "c", RECORDS[::-1])]
    first, same, other = (FileRecords(path).sha256 for path in paths)
    assert first == same != other


ONE = json.dumps(record("a"))
WRAPPED = {"info": {"v": 1}, "annotations": RECORDS}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04abc", "is a zip archive; unpack it"),
        (PRETTY.encode("utf-16"), "is in UTF-16; save the file as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<!doctype html>\n<html>", "is a web page or XML"),
        (
            b"id,image,question\n1,a.png,What?\n",
            r"begins with 'id,image,question', .* object \(a table\? name it",
        ),
        (b"hello\nworld\n", "begins with 'hello', which is no JSON list or object"),
        (b'"text"', "which is no JSON list or object"),
        (json.dumps(WRAPPED).encode(), "is one object and no list .*'annotations' has 2 of them: save that list alone"),
        (json.dumps(WRAPPED, indent=1).encode(), "is one object of several lines and no list .*'annotations' has 2"),
        (json.dumps(RECORDS[0], indent=1).encode(), r"is one object of several lines .* put it between \[ and \]"),
        ("\n".join(json.dumps(one, indent=1) for one in RECORDS).encode(), "has objects of several lines each"),
        (LINES.replace("\n", ",\n").encode(), "has commas between its objects but no list around them"),
        (json.dumps(RECORDS)[1:-1].encode(), "has commas between its objects but no list around them"),
        (f"[[{ONE}], [{ONE}]]".encode(), "is a list whose first value is a list; expected a list of objects"),
        (b"[1, 2]", "is a list whose first value is a number"),
        (f"[{ONE},\n]".encode(), "after record 0: not JSON .a comma stands before the closing"),
        (f"[{ONE}]\n[{ONE}]".encode(), "after record 0: not JSON .a second list follows, join them"),
        (b"{'id': 1}\n{'id': 2}\n", "is neither a JSON list nor one JSON object a line .the first line: Expecting"),
    ],
)
def test_another_file_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        RecordSource.open(DomainConfig("d", str(path)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "is a folder; name a file in it, such as train.json"),
        ("x" * 300, "cannot be read .File name too long.; check the path"),
        ("a\0b", "is no name of a folder or file"),
    ],
)
def test_a_path_that_is_no_file_is_told(tmp_path, path, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.json").write_text("[]")
    with pytest.raises(UserError, match=message):
        open_records(f"{tmp_path}/{path}")


def test_a_broken_first_line_is_the_problem_of_its_record_only(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"a": \n{LINES}')
    records = FileRecords(path)
    assert [records[1], records[2]] == RECORDS
    with pytest.raises(UserError, match=r"record 0 is not JSON"):
        records[0]


HOSTILE = {
    "deep": (
        '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}",
        "nested deeper than can be read",
    ),
    "deep text": (
        '{"a": "]}", "b": ' + '{"\\"]": ' * 10**5 + "1" + "}" * 10**5 + "}",
        "nested deeper than can be read",
    ),
    "digits": ('{"id": ' + "9" * 5000 + "}", f"whole number of over {sys.get_int_max_str_digits():,} digits"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("lines", [False, True])
def test_a_record_that_the_reader_refuses_is_the_problem_of_its_record_only(tmp_path, name, lines):
    hostile, message = HOSTILE[name]
    path = tmp_path / "r.json"
    path.write_text(f"{ONE}\n{hostile}\n{ONE}" if lines else f"[{ONE}, {hostile} ,\n{ONE}]")
    records = FileRecords(path)
    assert [records[0], records[2]] == [record("a")] * 2
    assert list(records.values()) == [record("a"), None, record("a")]
    with pytest.raises(UserError, match=rf"record 1 is not JSON \(it .*{message}") as caught:
        records[1]
    assert len(str(caught.value)) < 400


def test_a_reason_is_given_for_whatever_cannot_be_decoded():
    for content in (b"{", b'{"a": "\xff"}', b"[" * 10**5, b"9" * 5000):
        with pytest.raises(ValueError, match=r"\S"):
            decode(content)
