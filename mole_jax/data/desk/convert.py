"""A mixture as ArrayRecord shards that hold its pictures: the files as they lie, not encoded again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data.containers import array_record
from mole_jax.data.conversation import Example
from mole_jax.data.desk.look import progress
from mole_jax.data.image import image_bytes
from mole_jax.data.left_out import LeftOut
from mole_jax.data.load import BAD_RECORD, Loader, RecordProblem
from mole_jax.errors import UserError
from mole_jax.files import path_of


def convert(data: DataConfig, loader: Loader, output: str, *, shards: int) -> list[LeftOut]:
    """Writes each domain to a folder of its name in `output`, as messages with the content of their image files.

    A record that is too long, or whose picture is broken, is written all the same: what is done with it is for the
    training that reads it. One that is no example, or whose image is not there, cannot be.

    Args:
        data: the mixture; caps are not applied.
        loader: of its domains.
        output: a folder, in which those of the domains are made.
        shards: files of each domain.

    Returns:
        What could not be written, under `data.on_bad_record` skip.

    Raises:
        UserError: a record cannot be written and `data.on_bad_record` is error, or a folder is there already.
    """
    found = []
    for number, domain in enumerate(data.domains):
        keys, left_out = _usable(data, loader, number)
        folder = path_of(output) / domain.name
        records = (_record(loader, number, index) for index in keys)
        told = progress(records, len(keys), "record")
        array_record.write(folder, told, total=len(keys), shards=min(shards, len(keys)))
        found.append(left_out)
    return found


def _usable(data: DataConfig, loader: Loader, domain: int) -> tuple[Sequence[int], LeftOut]:
    """Returns the records that can be written."""
    source, reasons, keys = loader.sources[domain], {}, []
    total = len(source.records)
    for index in range(total):
        try:
            _record(loader, domain, index)
        except UserError as error:
            if data.on_bad_record == "error":
                raise UserError(f"{error} (or set data.on_bad_record to skip)") from None
            reason = error.reason if isinstance(error, RecordProblem) else BAD_RECORD
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        keys.append(index)
    if not keys:
        raise UserError(f"domain {source.name}: none of its {total} records can be written")
    return keys, LeftOut(source.name, total, total, reasons)


def _record(loader: Loader, domain: int, index: int) -> dict[str, Any]:
    source = loader.sources[domain]
    example = loader.parse(domain, index)
    try:
        images = [image_bytes(one, source.image_root) for one in example.images]
    except UserError as error:
        where = f"{source.records.file}: record {index}, field image"
        raise RecordProblem("bad image", f"{where}: {error}", f"{source.name}/{example.id}") from None
    return _written(example, images)


def _written(example: Example, images: list[bytes]) -> dict[str, Any]:
    turns = [
        {"role": turn.role, "content": turn.text} | ({} if turn.supervised else {"loss": False})
        for turn in example.turns
    ]
    return {"id": example.id, "messages": turns} | ({"images": images} if images else {})


def config_lines(data: DataConfig, output: str) -> Iterator[str]:
    """Yields the lines of a config file that read what `convert` wrote to `output`."""
    yield "domains=("
    for domain in data.domains:
        plain = {"image_root": None, "layout": None, "columns": (), "where": ()}
        there = dataclasses.replace(domain, path=str(path_of(output) / domain.name), **plain)
        fields = [
            f"{field.name}={getattr(there, field.name)!r}"
            for field in dataclasses.fields(DomainConfig)
            if field.name in ("name", "path") or getattr(there, field.name) != field.default
        ]
        yield f"    DomainConfig({', '.join(fields)}),"
    yield "),"
