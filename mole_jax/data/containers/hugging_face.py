"""Hugging Face datasets, by name or folder: ``hf:NAME_OR_FOLDER[:CONFIG]:SPLIT``."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mole_jax.data.containers.shards import content_hash
from mole_jax.errors import UserError

HF = "hf:"
ALL = "all"
"""The split of a folder that has one and no name for it."""
_NAME = re.compile(r"hf:(?P<name>.+?)(?::(?P<config>[^:\[\]/]+))?:(?P<split>\w[\w.+-]*(?:\[[^\]]*\])?)")
SAVED = ("state.json", "dataset_dict.json")
"""Files of which a folder of `save_to_disk` has one: of a split, or of several."""
_BATCH = 64


class HfRecords(Sequence):
    """The rows of a split, by index, memory-mapped; can be pickled, as the names of its Arrow files.

    Pictures stay encoded: a mapping with `bytes` and `path`, of which one may be None.
    """

    def __init__(self, name: str):
        """Opens ``hf:NAME_OR_FOLDER[:CONFIG]:SPLIT``: a folder of `save_to_disk` or of files, or a set of the hub.

        Raises:
          UserError: `datasets` is not installed, there is no such set, configuration or split, or it has no rows.
        """
        self.file = name
        found = _NAME.fullmatch(name)
        if found is None:
            raise UserError(f"{name}: expected hf:NAME_OR_FOLDER:SPLIT, for example hf:HuggingFaceM4/ChartQA:train")
        try:
            import datasets
        except ModuleNotFoundError:
            raise UserError(f"{name}: needs the package datasets; pip install datasets") from None
        opened = _open(datasets, name, found["name"], found["config"], found["split"])
        for column, feature in opened.features.items():
            if (encoded := _undecoded(feature, datasets)) is not feature:
                opened = opened.cast_column(column, encoded)
        self._rows = opened
        if not len(self):
            raise UserError(f"{name}: the split has no rows; choose another")
        self.sha256 = content_hash(sorted({file["filename"] for file in opened.cache_files}))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._rows[range(len(self))[index]]
        except OSError as error:
            raise UserError(f"{self.file}: record {index} cannot be read ({error}); open it again") from None

    def values(self) -> Iterator[Any]:
        """Yields all records in order."""
        yield from self._rows

    def without_pictures(self) -> Iterator[Any]:
        """Yields all records in order, with None for each value of bytes, without reading those."""
        columns = self._rows.data.column_names
        for begin in range(0, len(self), _BATCH):
            table = self._rows.with_format("arrow")[begin : begin + _BATCH]
            bare = {name: _without_bytes(table.column(name).combine_chunks()).to_pylist() for name in columns}
            yield from (dict(zip(bare, row, strict=True)) for row in zip(*bare.values(), strict=True))


def folder_of(name: str) -> str | None:
    """Returns the folder that ``hf:FOLDER…`` names; None for a set of the hub."""
    found = _NAME.fullmatch(name)
    return found["name"] if found and pathlib.Path(found["name"]).is_dir() else None


def saved(folder: pathlib.Path) -> str:
    """Returns the ``hf:`` name of a folder that `save_to_disk` wrote with one split.

    Raises:
      UserError: it has several splits; the message names them.
    """
    if (folder / SAVED[0]).is_file():
        return f"{HF}{folder}:{ALL}"
    splits = sorted(one.parent.name for one in folder.glob(f"*/{SAVED[0]}"))
    if len(splits) != 1:
        raise UserError(
            f"{folder}: is a Hugging Face set with the splits {', '.join(splits) or 'none'}; name one, such as "
            f"{HF}{folder}:{splits[0] if splits else 'train'}"
        )
    return f"{HF}{folder}:{splits[0]}"


def _open(datasets: Any, name: str, where: str, config: str | None, split: str) -> Any:
    folder = pathlib.Path(where)
    try:
        if not any((folder / file).is_file() for file in SAVED):
            return datasets.load_dataset(where, config, split=split)
        opened = datasets.load_from_disk(where)
    except Exception as error:  # of many types, by what is missing
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name}: cannot be opened ({why[:300]}); check the name, the split and, for a set of the hub, the network"
        ) from None
    splits = opened if isinstance(opened, Mapping) else {str(opened.split or split): opened, ALL: opened}
    if split not in splits:
        raise UserError(f"{name}: has no split {split}; name one of {', '.join(one for one in splits if one != ALL)}")
    return splits[split]


def _undecoded(feature: Any, datasets: Any) -> Any:
    """Returns a feature with its pictures left encoded; `feature` itself where it has none."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _undecoded(feature.feature, datasets)
        return feature if inner is feature.feature else type(feature)(inner)
    if isinstance(feature, dict):
        inner = {key: _undecoded(one, datasets) for key, one in feature.items()}
        return feature if all(inner[key] is feature[key] for key in feature) else inner
    return feature


def _without_bytes(array: Any) -> Any:
    """Returns an Arrow array with its values of bytes null, and null lists empty; reads none of those values."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.nulls(len(array))
    if pa.types.is_struct(kind):
        inner = [_without_bytes(one) for one in array.flatten()]
        return pa.StructArray.from_arrays(inner, names=[field.name for field in kind]) if inner else array
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.fill_null(pc.call_function("list_value_length", [array]), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
        return pa.LargeListArray.from_arrays(offsets, _without_bytes(array.flatten()))
    return array
