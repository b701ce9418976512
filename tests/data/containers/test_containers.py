"""Every container gives the same records, by index and in order, in other processes too."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import pickle
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from mole_jax.config import DomainConfig
from mole_jax.data.containers import array_record, shards, unpacked
from mole_jax.data.containers.open import image_root, open_records
from mole_jax.data.containers.parquet import ParquetRecords
from mole_jax.data.fingerprint import fingerprint
from mole_jax.data.load import RecordSource
from mole_jax.errors import UserError
from tests.data.containers.written import CONTAINERS, INSIDE, PATHS, hf_set, picture, write_pictures, zstd
from tests.data.domains_on_disk import record


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folders of what is unpacked and of what `datasets` prepares."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shown(value: dict) -> dict:
    """A record with its image as content: from a path, or the mapping that Hugging Face's sets have."""
    image = value.get("image")
    if isinstance(image, dict):
        image = image["bytes"]
    if isinstance(image, str):
        image = picture(int(image.removesuffix(".png")))
    return {name: value[name] for name in ("id", "conversations")} | ({} if image is None else {"image": image})


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_records_are_the_same_in_every_container(tmp_path, name):
    path = CONTAINERS[name](tmp_path)
    records = open_records(path)
    assert [shown(records[i]) for i in reversed(range(len(records)))] == INSIDE[::-1]
    assert [shown(value) for value in records.values()] == INSIDE
    assert all(isinstance(value, dict) for value in records.without_pictures())
    with pytest.raises(IndexError):
        records[len(records)]
    copy = pickle.loads(pickle.dumps(records))
    assert [shown(copy[i]) for i in range(len(copy))] == INSIDE
    assert copy.sha256 == open_records(path).sha256
    assert records.file in (path, f"hf:{path}:train")


def _read(records, index: int) -> dict:
    return shown(records[index])


def test_workers_read_every_container(tmp_path):
    opened = []
    for number, write in enumerate(CONTAINERS.values()):
        (folder := tmp_path / str(number)).mkdir()
        opened.append(open_records(write(folder)))
        opened[-1][0]  # what is open here must not hinder the copy
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_read, opened, [3] * len(opened)))
    assert found == [INSIDE[3]] * len(opened)


@pytest.mark.parametrize("name", ["csv", "parquet shards", "webdataset", "array_record", "hf"])
def test_threads_read_at_once(tmp_path, name):
    records = open_records(CONTAINERS[name](tmp_path))
    start = threading.Barrier(8)

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, len(records), 40).tolist()
        start.wait()
        return all(shown(records[i]) == INSIDE[i] for i in order)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_a_worker_gets_no_records(tmp_path):
    """A thousand times the text and pictures are a few more bytes of places, not a copy."""
    content = os.urandom(2000)
    many = [record(str(i), "x" * 500, "y" * 500, content) for i in range(200)]
    array_record.write(tmp_path / "a", iter(many), total=200, shards=2)
    pq.write_table(pa.Table.from_pylist(many), tmp_path / "r.parquet", row_group_size=10)
    with webdataset.TarWriter(str(tmp_path / "r.tar")) as writer:
        for one in many:
            writer.write({"__key__": one["id"], "json": {"conversations": one["conversations"]}, "png": content})
    (tmp_path / "r.csv").write_text("id,question\n" + "".join(f"{i},{'x' * 2000}\n" for i in range(200)))
    hf_set(tmp_path).save_to_disk(tmp_path / "hf")
    for name in ("a", "r.parquet", "r.tar", "r.csv", "hf"):
        records = open_records(str(tmp_path / name))
        records[len(records) - 1]
        assert len(pickle.dumps(records)) < 20_000, name


def test_a_process_keeps_two_row_groups(tmp_path):
    pq.write_table(pa.table({"id": list(range(10)), "b": ["x"] * 10}), tmp_path / "r.parquet", row_group_size=2)
    records = ParquetRecords([tmp_path / "r.parquet"], "r")
    assert [records[i]["id"] for i in range(10)] == list(range(10))
    assert [len(table) for table in records._tables.values()] == [2, 2]


def test_large_row_groups_are_told_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mole_jax.data.containers.parquet._LARGE", 10)
    open_records(CONTAINERS["parquet"](tmp_path))
    assert "a record is read with its whole group; `python -m mole_jax.data convert`" in capsys.readouterr().err


def test_a_file_is_unpacked_once_and_told_where(tmp_path, cache, capsys):
    path = CONTAINERS["zst"](tmp_path)
    records = open_records(path)
    (copy,) = cache.rglob("r.json")
    assert f"{path}: unpacked to {copy} (" in capsys.readouterr().err
    assert json.loads(copy.read_text()) == PATHS
    written = copy.stat().st_mtime_ns
    again = open_records(path)
    assert capsys.readouterr().err == ""
    assert copy.stat().st_mtime_ns == written
    assert again.sha256 == records.sha256
    assert image_root(path, None) == str(tmp_path)
    assert [one.name for one in copy.parent.iterdir()] == ["r.json"]


def test_a_compressed_table_is_read_too(tmp_path):
    plain = pathlib.Path(CONTAINERS["tsv"](tmp_path))
    (tmp_path / "r.tsv.zst").write_bytes(zstd(plain.read_bytes()))
    records = open_records(str(tmp_path / "r.tsv.zst"))
    assert [shown(value) for value in records.values()] == INSIDE
    with pytest.raises(UserError, match=r"r\.json\.gz: is compressed by gzip and cannot be unpacked"):
        _cut(CONTAINERS["gz"](tmp_path))
    assert not list(unpacked.cache_folder().rglob("*r.json*"))


def _cut(path: str) -> None:
    file = pathlib.Path(path)
    file.write_bytes(file.read_bytes()[:-20])
    open_records(path)


def test_cells_without_a_value_are_absent_and_others_stay_as_written(tmp_path):
    (tmp_path / "r.csv").write_text('id,question,answer,n\n1,NA,"NA ",None\n2,"",nan, \n\n3,"[a]",x,007\n')
    assert list(open_records(str(tmp_path / "r.csv")).values()) == [
        {"id": "1", "answer": "NA ", "n": "None"},
        {"id": "2", "n": " "},
        {"id": "3", "question": "[a]", "answer": "x", "n": "007"},
    ]


def test_a_cell_longer_than_csv_takes_by_itself(tmp_path):
    (tmp_path / "r.tsv").write_text(f"id\timage\n1\t{'A' * 200_000}\n")
    assert len(open_records(str(tmp_path / "r.tsv"))[0]["image"]) == 200_000


def test_members_of_a_sample(tmp_path):
    """Several pictures, texts, a class, other files, and an embedded picture that the JSON has itself."""
    url = "data:image/png;base64,AAAA"
    samples = [
        {"__key__": "one", "json": {"images": ["a", "b"], "x": 1}, "0.png": b"1", "1.jpg": b"2", "mask.png": b"no"},
        {"__key__": "two", "txt": "Größe", "cls": 7, "JPG": b"3", "npy": np.zeros(2)},
        {"__key__": "three", "json": {"id": "own", "image": url}, "png": b"4"},
    ]
    with webdataset.TarWriter(str(tmp_path / "r.tar")) as writer:
        for sample in samples:
            writer.write(sample)
    assert list(open_records(str(tmp_path / "r.tar")).values()) == [
        {"id": "one", "images": [b"1", b"2"], "x": 1},
        {"id": "two", "txt": "Größe", "cls": 7, "image": b"3"},
        {"id": "own", "image": url},
    ]


def test_the_folder_of_images(tmp_path):
    """That of the file, and of a folder itself."""
    for name in ("jsonl", "parquet", "csv"):
        assert image_root(CONTAINERS[name](tmp_path), None) == str(tmp_path)
    assert image_root(CONTAINERS["parquet shards"](tmp_path), None) == str(tmp_path / "set")
    assert image_root(str(tmp_path / "set" / "*.parquet"), None) == str(tmp_path / "set")
    assert image_root(CONTAINERS["hf"](tmp_path), None) == str(tmp_path / "saved")
    assert image_root("hf:someone/set:train", None) is None
    assert image_root("hf:someone/set:train", "elsewhere") == "elsewhere"


def test_one_set_of_a_folder_by_a_pattern(tmp_path):
    for name, ids in {"train-0": [1, 2], "train-1": [3], "test-0": [4]}.items():
        pq.write_table(pa.table({"id": ids, "q": ["x"] * len(ids)}), tmp_path / f"{name}.parquet")
    assert [one["id"] for one in open_records(str(tmp_path / "train-*.parquet")).values()] == [1, 2, 3]
    assert [one["id"] for one in open_records(str(tmp_path / "train-{0..1}.parquet")).values()] == [1, 2, 3]


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_hash_of_a_domain_is_of_records_and_of_pictures_in_files(tmp_path, name):
    path = CONTAINERS[name](tmp_path)
    write_pictures(tmp_path)
    inside = not isinstance(next(iter(open_records(path).values()))["image"], str)

    def look() -> dict[str, str]:
        return fingerprint(RecordSource.open(DomainConfig("d", path)))

    before = look()
    assert look() == before
    with (tmp_path / "0.png").open("ab") as file:
        file.write(b"x")
    after = look()
    assert after["records"] == before["records"]
    assert (after["images"] == before["images"]) == inside


def test_the_hash_of_large_files_is_of_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_WHOLE", 50)
    monkeypatch.setattr(shards, "_END", 10)
    file = tmp_path / "a"

    def of(content: bytes) -> str:
        file.write_bytes(content)
        return shards.content_hash([file])

    large, small = bytes(100), bytes(50)
    assert of(large) == of(bytes(60) + b"x" + bytes(39))
    changed = [large, b"x" + bytes(99), bytes(99) + b"x", bytes(101), small, bytes(20) + b"x" + bytes(29)]
    assert len({of(content) for content in changed}) == len(changed)
