"""Which container a path is: by its prefix, its name, and its first bytes."""

from __future__ import annotations

import codecs
import os
import pathlib

from etils import epath

from mole_jax.data.containers.array_record import ArrayRecords
from mole_jax.data.containers.container import Records
from mole_jax.data.containers.hugging_face import HF, SAVED, HfRecords, folder_of, saved
from mole_jax.data.containers.json_file import FileRecords
from mole_jax.data.containers.parquet import ParquetRecords
from mole_jax.data.containers.shards import check_complete, check_local, expanded, is_pattern
from mole_jax.data.containers.table import SUFFIXES, TableRecords
from mole_jax.data.containers.tfds import TFDS, TfdsRecords
from mole_jax.data.containers.unpacked import is_compressed, unpacked
from mole_jax.data.containers.web_dataset import WebDatasetRecords
from mole_jax.errors import UserError
from mole_jax.files import path_of
from mole_jax.terminal import shortened

SHARDED = {"parquet": ParquetRecords, "tar": WebDatasetRecords, "array_record": ArrayRecords}
"""Containers that may be several files, by their suffix."""


def open_records(path: str) -> Records:
    """Opens the records at `path`.

    A file: JSON, JSONL, CSV or TSV, also compressed; parquet, a WebDataset tar, ArrayRecord. Of the last three also a
    folder, or a pattern such as ``shard-{000..012}.tar`` or ``train-*.parquet``. A folder of `save_to_disk`,
    ``hf:NAME_OR_FOLDER[:CONFIG]:SPLIT``, or ``tfds:NAME:SPLIT``.

    Raises:
      UserError: there is nothing to read, or nothing that is known; the message names the file.
    """
    if path.startswith(TFDS):
        return TfdsRecords(path)
    if _is_hf(path):
        return HfRecords(path)
    try:
        where = path_of(path)
        if is_pattern(path) and not where.exists():
            return _several(expanded(path), path)
        if where.is_dir():
            return _folder(where, path)
        if where.is_file():
            return _file(where, path)
    except OSError:
        pass  # told by the next line
    return FileRecords(path)


def image_root(path: str, root: str | None) -> str | None:
    """Returns the folder of a container's images: `root`, or that of `path`: itself, or where the file lies."""
    if root is not None:
        return root
    if path.startswith(TFDS):
        return None
    if _is_hf(path):
        return folder_of(path)
    where = path_of(path)
    return str(where if where.is_dir() else where.parent)


def _is_hf(path: str) -> bool:
    return path.startswith(HF) and not path.startswith("hf://")


def _kind(name: str) -> str | None:
    """Returns which of `SHARDED` a file's name is; tensorflow-datasets writes the shard's number last."""
    stem = name.split("-of-")[0] if ".array_record-" in name else name
    return next((kind for kind in SHARDED if stem.endswith(f".{kind}") or f".{kind}-" in stem), None)


def _several(files: list[epath.Path], name: str) -> Records:
    kinds = {_kind(file.name) for file in files}
    if len(kinds) != 1 or None in kinds:
        odd = next((file.name for file in files if _kind(file.name) is None), files[0].name)
        raise UserError(
            f"{name}: names files of several kinds or of none that is read as shards (such as {shortened(odd)}); name "
            f"files of one of .{', .'.join(SHARDED)}"
        )
    return SHARDED[kinds.pop() or ""](files, name)


def _folder(folder: epath.Path, name: str) -> Records:
    if any((folder / file).exists() for file in SAVED):
        check_local(name, "a set of Hugging Face's")
        return HfRecords(saved(pathlib.Path(folder)))
    files = sorted(file for file in folder.iterdir() if _kind(file.name) and not file.name.startswith("."))
    if (kinds := sorted({_kind(file.name) or "" for file in files})) and len(kinds) > 1:
        raise UserError(
            f"{name}: has files of several kinds (.{', .'.join(kinds)}); name those of one, such as "
            f"{os.path.join(name, '*.' + kinds[0])}"
        )
    if (folder / "features.json").exists() and (folder / "dataset_info.json").exists():
        raise UserError(
            f"{name}: is a prepared tensorflow-datasets set; set TFDS_DATA_DIR to the folder it was prepared in, and "
            "name it tfds:NAME:SPLIT"
        )
    if not files:
        raise UserError(f"{name}: is a folder{_within(folder)}")
    check_complete(files, name)
    return SHARDED[kinds[0]](files, name)


def _within(folder: epath.Path) -> str:
    """Returns what to name instead of a folder without shards."""
    inside = sorted(folder.iterdir())
    readable = (".json", ".jsonl", *SUFFIXES)
    for one in inside:
        if any(suffix in readable for suffix in one.suffixes[-2:]) or (
            one.is_dir() and any(_kind(file.name) for file in one.iterdir())
        ):
            return f"; name a file in it, such as {shortened(one.name)}" if one.is_file() else f"; name {one}"
    return f" without files that are read ({', '.join(readable)}, .{', .'.join(SHARDED)}); name another"


def _file(file: epath.Path, name: str) -> Records:
    with file.open("rb") as stream:
        first = stream.read(512)
    if is_compressed(first):
        inner = unpacked(name)
        if first_kind(inner):
            raise UserError(f"{name}: is compressed; unpack it, for a .{first_kind(inner)} is read by places within")
        return TableRecords(inner, name) if inner.suffix in SUFFIXES else FileRecords(inner, name)
    if kind := first_kind(file):
        return SHARDED[kind]([file], name)
    if file.suffix.lower() in SUFFIXES and not first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"PK\3\4")):
        return TableRecords(file, name)
    return FileRecords(name)


def first_kind(file: os.PathLike[str]) -> str | None:
    """Returns which of `SHARDED` a file is, by its first bytes or, where those tell nothing, its name."""
    with path_of(file).open("rb") as stream:
        first = stream.read(512)
    if first.startswith(b"PAR1"):
        return "parquet"
    if first[257:262] == b"ustar":
        return "tar"
    return _kind(path_of(file).name)
