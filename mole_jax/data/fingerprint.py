"""What a domain's files hold, as hashes that are cheap: a run that resumes on other data is no longer that run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from mole_jax.data.containers.json_file import FileRecords
from mole_jax.data.layouts import llava
from mole_jax.data.load import RecordSource
from mole_jax.errors import UserError
from mole_jax.files import is_remote

# Looked for in the text of the file: ten times as fast as decoding every record.
_IMAGE = re.compile(rb'"image"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*"|\[[^\]]*\])', re.DOTALL)
_THREADS, _BATCH = 16, 2048
_DIGITS = 16
"""Hexadecimal digits of a hash: no one looks for two data sets of one hash on purpose."""


def fingerprint(source: RecordSource) -> dict[str, str]:
    """Returns ``{"records": …, "images": …}``, the hashes of what a domain or task consists of.

    Records by the content of their container (`Records.sha256`; of large shards by their ends,
    `mole_jax.data.containers.shards.content_hash`), and so the images in it. Images in files by their names in the
    records and their sizes on disk: another picture of the same name and size is not noticed.
    """
    records = source.records
    images = hashlib.sha256()
    for name, size in _sizes(_image_names(source), source.image_root or ""):
        images.update(f"{name}\0{size}\n".encode("utf-8", "surrogatepass"))
    return {"records": records.sha256[:_DIGITS], "images": images.hexdigest()[:_DIGITS]}


def _image_names(source: RecordSource) -> Iterator[str]:
    records = source.records
    if isinstance(records, FileRecords) and source.layout is llava.LAYOUT:
        yield from _written_names(records)
        return
    for record in records.without_pictures():
        try:
            images = source.layout.read(record, _fail).images
        except UserError:
            continue  # the problem of that record
        yield from (one for one in images if isinstance(one, str) and not one.startswith("data:"))


def _fail(field: str, problem: str) -> UserError:
    return UserError(f"{field}: {problem}")


def _written_names(records: FileRecords) -> Iterator[str]:
    for found in _IMAGE.finditer(records.path.read_bytes()):
        try:
            value = json.loads(found[1])
        except (ValueError, RecursionError):
            continue  # no path: the problem of its record
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))


def _sizes(names: Iterable[str], root: str) -> Iterator[tuple[str, int]]:
    """Yields each name with the size of its file, -1 where there is none; on network disks many are asked at once."""

    def look(batch: tuple[str, ...]) -> list[tuple[str, int]]:
        return [(name, _size(os.path.join(root, name))) for name in batch]

    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in pool.map(look, itertools.batched(names, _BATCH)):
            yield from batch


def _size(path: str) -> int:
    try:
        return epath.Path(path).stat().length if is_remote(path) else os.stat(path).st_size
    except (OSError, ValueError, UserError):
        return -1
