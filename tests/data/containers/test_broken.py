"""What is broken, or another thing than its name says, is told in one line: what, which file, what to do."""

from __future__ import annotations

import gzip
import io
import json
import pathlib
import re
import tarfile
from collections.abc import Callable

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mole_jax.config import DomainConfig
from mole_jax.data.containers import array_record
from mole_jax.data.containers.open import open_records
from mole_jax.data.load import RecordSource
from mole_jax.errors import UserError
from tests.data.containers.written import CONTAINERS, INSIDE, PATHS, hf_set, web, zstd

LINE = json.dumps(PATHS[0]).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def cut(path: str, to: float, at: str = "") -> str:
    """Cuts a file, or the first of a folder, to a part of its length; returns `path`."""
    file = pathlib.Path(at or path)
    file = min(file.iterdir()) if file.is_dir() else file
    content = file.read_bytes()
    file.write_bytes(content[: int(to * len(content))])
    return path


def tar(folder: pathlib.Path, name: str = "r.tar", mode: str = "w", **members: bytes) -> str:
    with tarfile.open(folder / name, mode) as file:  # type: ignore[call-overload]
        for member, content in members.items():
            info = tarfile.TarInfo(member.replace("_", "."))
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return str(folder / name)


def two_tars(folder: pathlib.Path) -> str:
    one = pathlib.Path(tar(folder, a_json=LINE)).read_bytes()
    (folder / "r.tar").write_bytes(one + one)
    return str(folder / "r.tar")


def written(name: str, content: bytes) -> Callable[[pathlib.Path], str]:
    def write(folder: pathlib.Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


def tables(**files: pa.Table) -> Callable[[pathlib.Path], str]:
    def write(folder: pathlib.Path) -> str:
        for name, rows in files.items():
            pq.write_table(rows, folder / f"{name}.parquet")
        return str(folder)

    return write


def without(name: str, file: str) -> Callable[[pathlib.Path], str]:
    """Writes a container and takes a file of it away."""

    def write(folder: pathlib.Path) -> str:
        path = CONTAINERS[name](folder)
        next(folder.rglob(file)).unlink()
        return path

    return write


def two_splits(folder: pathlib.Path) -> str:
    both = {name: datasets.Dataset.from_dict({"id": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(folder / "saved")
    return str(folder / "saved")


def mixed(folder: pathlib.Path) -> str:
    CONTAINERS["parquet"](folder)
    tar(folder, a_json=LINE)
    return str(folder)


def no_records(folder: pathlib.Path) -> str:
    array_record.write(folder / "a", iter([]), total=0, shards=1)
    return str(folder / "a")


ROW = pa.table({"id": [1], "question": ["x"]})
ODD = pa.table({"id": [1], "answer": ["x"]})
FILES = {
    "gz cut": (lambda d: cut(CONTAINERS["gz"](d), 0.9), "gzip and cannot be unpacked .*fetch it again"),
    "bz2 cut": (lambda d: cut(CONTAINERS["bz2"](d), 0.9), "bzip2 and cannot be unpacked .*fetch it again"),
    "xz cut": (lambda d: cut(CONTAINERS["xz"](d), 0.9), "xz and cannot be unpacked .*fetch it again"),
    "zst cut": (lambda d: cut(CONTAINERS["zst"](d), 0.9), "zstd and cannot be unpacked .*fetch it again"),
    "gz damaged": (written("r.json.gz", gzip.compress(LINE)[:20] + b"x" * 50), "cannot be unpacked .*fetch it again"),
    "gz of text": (written("r.json.gz", gzip.compress(b"hello")), r"r\.json\.gz: begins with 'hello'"),
    "gz of a tar": (
        lambda d: tar(d, "r.tar.gz", "w:gz", a_json=LINE),
        r"is compressed; unpack it, for a \.tar is read",
    ),
    "zst of nothing": (written("r.jsonl.zst", zstd(b"")), "the file is empty"),
    "csv empty": (written("r.csv", b""), "the file is empty; expected a header and rows"),
    "csv of a header": (written("r.csv", b"id,question\n"), "has a header and no rows"),
    "csv of one column": (written("r.csv", b"id\n1\n"), "its header 'id' is one column; expected several"),
    "csv with two headers": (
        written("r.csv", b"id,q\n1,x\nid,q\n2,y\n"),
        "line 3 repeats the header; take it out",
    ),
    "csv with a name twice": (written("r.csv", b"id,q,q\n1,x,y\n"), "its header has 'q' twice; rename one"),
    "csv with an open quote": (
        written("r.csv", b'id,q\n1,"x\n2,y\n'),
        r"the row that begins in line 2 is not CSV \(unexpected end of data\); correct its quotes",
    ),
    "csv in latin 1": (written("r.csv", b"id,q\n1,\xe4\n"), "byte 7 is not UTF-8; save the file as UTF-8"),
    "csv in utf 16": (written("r.csv", "id,q\n1,x\n".encode("utf-16")), "in UTF-16; save the file as UTF-8"),
    "xlsx named csv": (written("r.csv", b"PK\x03\x04..."), "is a zip archive; unpack it"),
    "parquet cut": (lambda d: cut(CONTAINERS["parquet"](d), 0.9), "cannot be read as parquet .*fetch it again"),
    "parquet of text": (written("r.parquet", b"hello"), "cannot be read as parquet .*another file, fetch it again"),
    "parquet empty": (tables(r=ROW.slice(0, 0)), "has no rows; write it again"),
    "parquet shards of two kinds": (
        tables(a=ROW, b=ODD),
        r"b\.parquet: its columns are not those of .*a\.parquet \(answer, question in one alone\)",
    ),
    "parquet of two sets": (
        tables(**{"test-00000-of-00001": ROW, "train-00000-of-00001": ROW}),
        r"has the shards of several sets .*such as test-\*\.parquet",
    ),
    "parquet shard missing": (
        without("parquet shards", "train-00001-*"),
        "has 1 of the 2 shards that train-00000-of-00002.parquet tells of; fetch the others",
    ),
    "tar cut in a member": (
        lambda d: cut(web(d), 0.3, str(d / "tars" / "000.tar")),
        r"000\.tar: (cannot be read as a tar|ends early)",
    ),
    "tar cut after a member": (
        lambda d: cut(tar(d, a_json=LINE), 1024 / 10240),
        "ends early, after byte 1,024; .*fetch it again",
    ),
    "two tars in one": (two_tars, "has another tar after its end .*name each as a file of its own"),
    "tar of other things": (lambda d: tar(d, a_py=b"x"), "has no samples; expected members such as 0001.json"),
    "tar of text": (written("r.tar", b"hello" * 300), "cannot be read as a tar .*fetch it again"),
    "tar of a range missing": (without("webdataset", "001.tar"), r"1 of its 2 files are missing, such as 001\.tar"),
    "array_record cut": (
        lambda d: cut(CONTAINERS["array_record"](d), 0.5, str(d / "shards")),
        "cannot be read as ArrayRecord .*write or copy it again",
    ),
    "array_record of text": (written("r.array_record", b"hello" * 100), "cannot be read as ArrayRecord"),
    "array_record shard missing": (without("array_record", "*-00001-*"), "has 1 of the 2 shards"),
    "array_record of no records": (no_records, "has no records; write it again"),
    "hf without a split": (lambda d: "hf:set", "expected hf:NAME_OR_FOLDER:SPLIT, for example"),
    "hf with a wrong split": (
        lambda d: (two_splits(d), f"hf:{d}/saved:dev")[1],
        "has no split dev; name one of (test, train|train, test)",
    ),
    "hf with another split than it has": (
        lambda d: (hf_set(d).save_to_disk(d / "saved"), f"hf:{d}/saved:test")[1],
        "has no split test; name one of train",
    ),
    "hf of two splits": (two_splits, r"with the splits test, train; name one, such as hf:/.*/saved:test"),
    "hf of nothing": (lambda d: f"hf:{d}:train", "cannot be opened .*check the name, the split"),
    "hf damaged": (
        lambda d: cut(CONTAINERS["hf"](d), 0.5, str(next((d / "saved").glob("*.arrow")))),
        "cannot be opened .*check the name",
    ),
    "a folder of two kinds": (mixed, r"has files of several kinds \(\.parquet, \.tar\); name those of one, such as"),
    "a folder of nothing": (lambda d: str(d), r"is a folder without files that are read \(\.json, .*; name another"),
    "a folder with a table": (
        lambda d: str(pathlib.Path(CONTAINERS["csv"](d)).parent),
        r"is a folder; name a file in it, such as r\.csv",
    ),
    "a folder above the shards": (
        lambda d: str(pathlib.Path(CONTAINERS["parquet shards"](d)).parent),
        r"is a folder; name /.*/set",
    ),
    "a pattern of nothing": (lambda d: f"{d}/*.parquet", "no file fits this pattern; check the domain's path"),
    "a pattern of other files": (
        lambda d: (written("a.md", b"x")(d), f"{d}/*.md")[1],
        r"or of none that is read as shards \(such as a\.md\)",
    ),
    "arrow file": (written("r.arrow", b"ARROW1..."), "is an Arrow file; write its rows as JSONL or parquet"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_told_in_one_line(tmp_path, name):
    write, message = FILES[name]
    with pytest.raises(UserError, match=message) as caught:
        RecordSource.open(DomainConfig("d", write(tmp_path)))
    assert str(caught.value).startswith("domain d: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def damaged(name: str, at: str) -> Callable[[pathlib.Path], str]:
    """Writes a container, and zeros over the middle of a file of it."""

    def write(folder: pathlib.Path) -> str:
        path = CONTAINERS[name](folder)
        file = next(folder.rglob(at))
        content = file.read_bytes()
        file.write_bytes(content[:100] + bytes(60) + content[160:])
        return path

    return write


RECORDS = {
    "csv with few cells": (
        written("r.csv", b"id,q\n1,x\n2\n3,y\n"),
        1,
        r"r\.csv: record 1 \(line 3\) has 1 cells and the header 2; correct that row",
    ),
    "csv with many cells": (
        written("r.csv", b'id,q\n"1\n2",x\n2,x,y\n3,y\n'),
        1,
        r"r\.csv: record 1 \(line 4\) has 3 cells and the header 2; correct that row",
    ),
    "tar with a json that is none": (
        lambda d: tar(d, a_json=LINE, b_json=b"{", c_json=LINE),
        1,
        r"r\.tar: record 1 \('b'\): its \.json is not JSON",
    ),
    "tar with a json of a list": (
        lambda d: tar(d, a_json=LINE, b_json=b"[1]", c_json=LINE),
        1,
        r"record 1 \('b'\): its \.json is a list; expected an object",
    ),
    "tar with a class in words": (
        lambda d: tar(d, a_json=LINE, b_cls=b"dog", c_json=LINE),
        1,
        r"record 1 \('b'\): its \.cls is not a whole number",
    ),
    "tar with a text in latin 1": (
        lambda d: tar(d, a_json=LINE, b_txt=b"\xe4", c_json=LINE),
        1,
        r"record 1 \('b'\): its \.txt is not UTF-8",
    ),
    "parquet damaged within": (damaged("parquet shards", "train-00000*"), 0, "row group 0 cannot be read"),
    "array_record damaged within": (damaged("array_record", "*-00000-*"), 0, "record 0 cannot be read"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_broken_record_is_the_problem_of_that_record(tmp_path, name):
    write, index, message = RECORDS[name]
    records = open_records(write(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        records[index]
    assert re.search(r"; [a-z]", str(caught.value))
    assert len(str(caught.value)) < 400
    assert isinstance(records[len(records) - 1], dict)
    values = list(records.values())
    assert len(values) == len(records)
    assert values[index] is None
    assert values[-1] == records[len(records) - 1]


@pytest.mark.parametrize("name", ["csv", "webdataset"])
def test_a_file_changed_meanwhile_is_refused(tmp_path, name):
    records = open_records(CONTAINERS[name](tmp_path))
    file = next(one for pattern in ("*.csv", "000.tar") for one in tmp_path.rglob(pattern))
    with file.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match="has changed since it was opened; start again"):
        records[0]
    file.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        records[0]


def test_array_record_on_a_bucket_is_refused():
    with pytest.raises(UserError, match="gs://b/r: ArrayRecord is not read from a bucket; copy it to this machine"):
        array_record.ArrayRecords(["gs://b/r"], "gs://b/r")


def test_without_datasets_it_is_told_how_to_have_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="hf:a/b:train: needs the package datasets; pip install datasets"):
        open_records("hf:a/b:train")


def test_the_writer_refuses_what_it_cannot_keep(tmp_path):
    with pytest.raises(UserError, match=r"record 1 cannot be written .*correct it or take it out"):
        array_record.write(tmp_path / "a", iter([{"id": "a"}, {"id": 2**70}]), total=2, shards=1)
    with pytest.raises(TypeError, match="record 0: `image` must be the content"):
        array_record.write(tmp_path / "a", iter(PATHS), total=5, shards=1)
    for total in (4, 6):
        with pytest.raises(ValueError, match=f"{total} records were announced"):
            array_record.write(tmp_path / "a", iter(INSIDE), total=total, shards=2)
    assert not list(tmp_path.iterdir()), "nothing half made is left"
    array_record.write(tmp_path / "a", iter(INSIDE), total=5, shards=9)
    assert len(list((tmp_path / "a").iterdir())) == 5, "no more shards than records"
    with pytest.raises(UserError, match="a: is there already and not empty"):
        array_record.write(tmp_path / "a", iter(INSIDE), total=5, shards=1)
