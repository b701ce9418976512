"""The same records in every container, each made by the library that writes it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pathlib
from collections.abc import Callable, Mapping

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from mole_jax.data.containers import array_record
from tests.data.domains_on_disk import record


def picture(number: int) -> bytes:
    """Returns a PNG file of one colour, another for each number."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 20, 30)).save(file, "PNG")
    return file.getvalue()


def records(images: Callable[[int], object]) -> list[dict]:
    """Returns records of which all but the last have an image, as `images` gives it by number."""
    texts = ["What is it?", 'Größe, "quoted"\r\nin\ntwo lines?', "漢字; and\ttab", "0", "Text only"]
    return [record(f"r{i}", text, "A dog.", images(i) if i < 4 else None) for i, text in enumerate(texts)]


PATHS = records(lambda i: f"{i}.png")
INSIDE = records(picture)


def write_pictures(folder: pathlib.Path) -> None:
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture(i))


def json_lines(folder: pathlib.Path) -> str:
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, PATHS)))
    return str(folder / "r.jsonl")


def _compressed(suffix: str, compress: Callable[[bytes], bytes]) -> Callable[[pathlib.Path], str]:
    def write(folder: pathlib.Path) -> str:
        path = folder / f"r.json.{suffix}"
        # In two members, as `cat` of two compressed files makes them.
        text = json.dumps(PATHS).encode()
        path.write_bytes(compress(text[:50]) + compress(text[50:]))
        return str(path)

    return write


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def table(folder: pathlib.Path, name: str = "r.csv", **options) -> str:
    """As pandas and spreadsheets write it: with a mark of the byte order, and an index without a name."""
    with (folder / name).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, **options)
        writer.writerow(["", "id", "image", "conversations"])
        for i, one in enumerate(PATHS):
            turns = json.dumps(one["conversations"], ensure_ascii=False)
            writer.writerow([i, one["id"], one.get("image", ""), turns])
    return str(folder / name)


def _rows(pictures: list[dict]) -> pa.Table:
    return pa.Table.from_pylist([{"image": None} | one for one in pictures])


def parquet(folder: pathlib.Path) -> str:
    pq.write_table(_rows(PATHS), folder / "r.parquet", row_group_size=2)
    return str(folder / "r.parquet")


def parquet_shards(folder: pathlib.Path) -> str:
    (folder / "set").mkdir()
    images = [one | {"image": {"bytes": one["image"], "path": None}} if "image" in one else one for one in INSIDE]
    rows = _rows(images)
    pq.write_table(rows.slice(0, 3), folder / "set" / "train-00000-of-00002.parquet", row_group_size=1)
    pq.write_table(rows.slice(3), folder / "set" / "train-00001-of-00002.parquet")
    return str(folder / "set")


def hf_set(folder: pathlib.Path, **images) -> datasets.Dataset:
    columns = {name: [one.get(name) for one in PATHS] for name in ("id", "conversations")}
    write_pictures(folder)
    files = [str(folder / one["image"]) if "image" in one else None for one in PATHS]
    made = datasets.Dataset.from_dict({**columns, "image": files}, split="train")
    return made.cast_column("image", datasets.Image())


def hf(folder: pathlib.Path) -> str:
    hf_set(folder).save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}:train"


def hf_folder(folder: pathlib.Path) -> str:
    datasets.DatasetDict(train=hf_set(folder)).save_to_disk(folder / "saved")
    return str(folder / "saved")


def web(folder: pathlib.Path, places: Mapping[str, slice] | None = None) -> str:
    (folder / "tars").mkdir()
    for name, place in (places or {"000": slice(0, 3), "001": slice(3, None)}).items():
        with webdataset.TarWriter(str(folder / "tars" / f"{name}.tar")) as writer:
            for one in INSIDE[place]:
                fields = {name: one[name] for name in ("id", "conversations")}
                image = {"png": one["image"]} if "image" in one else {}
                # The JSON names the picture that lies beside it, as those of LLaVA do.
                named = {"image": "somewhere/0.png"} if image else {}
                writer.write({"__key__": f"a/{one['id']}", "json": fields | named, **image})
    return str(folder / "tars" / "{000..001}.tar")


def web_folder(folder: pathlib.Path) -> str:
    return str(pathlib.Path(web(folder)).parent)


def array_shards(folder: pathlib.Path) -> str:
    array_record.write(folder / "shards", iter(INSIDE), total=5, shards=2)
    return str(folder / "shards")


CONTAINERS: Mapping[str, Callable[[pathlib.Path], str]] = {
    "jsonl": json_lines,
    "gz": _compressed("gz", gzip.compress),
    "bz2": _compressed("bz2", bz2.compress),
    "xz": _compressed("xz", lzma.compress),
    "zst": _compressed("zst", zstd),
    "csv": table,
    "semicolons": lambda folder: table(folder, delimiter=";"),
    "tsv": lambda folder: table(folder, "r.tsv", delimiter="\t"),
    "parquet": parquet,
    "parquet shards": parquet_shards,
    "hf": hf,
    "hf folder": hf_folder,
    "webdataset": web,
    "webdataset folder": web_folder,
    "array_record": array_shards,
}
