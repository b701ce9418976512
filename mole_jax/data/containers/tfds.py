"""Random access to the raw records of a prepared tensorflow-datasets set, without TensorFlow."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mole_jax.data.containers.container import in_order
from mole_jax.data.containers.json_file import decode
from mole_jax.errors import UserError

TFDS = "tfds:"


class TfdsRecords(Sequence):
    """The records of a prepared tensorflow-datasets split, by index; can be pickled.

    Fields: `id` (text), `image` (encoded bytes, or text with a path, empty for none) and `conversations`
    (a sequence of from and value, or text with the same as JSON). The set's folder is TFDS_DATA_DIR.
    TensorFlow is not needed.
    """

    def __init__(self, name: str):
        """Opens `tfds:NAME:SPLIT`; raises `UserError` if there is no such prepared set or split."""
        self.file = name
        parts = name.removeprefix(TFDS).rsplit(":", 1)
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{name}: expected tfds:NAME:SPLIT, for example tfds:my_set:train")
        self._name, self._split = parts
        self.folder = os.environ.get("TFDS_DATA_DIR")
        self._source: Any = None
        self._embedded = False
        self.sha256 = ""
        """Hash of the set's description, and of the names and sizes of its files."""
        self._size = len(self._open())
        if not self._size:
            raise UserError(f"{name}: the split has no records; prepare it again")

    def _open(self) -> Any:
        if self._source is None:
            try:
                import tensorflow_datasets as tfds
            except ModuleNotFoundError as error:
                if error.name != "tensorflow_datasets":
                    raise
                raise UserError(f"{self.file}: needs tensorflow-datasets: pip install 'mole-jax[tfds]'") from None
            try:
                # Images stay encoded: decoding, with its checks, is done in one place.
                builder: Any = tfds.builder(self._name, data_dir=self.folder, try_gcs=False)
                encoded = {
                    key: tfds.decode.SkipDecoding()
                    for key, feature in builder.info.features.items()
                    if isinstance(feature, tfds.features.Image)
                }
                self._embedded = bool(encoded)
                self._source = builder.as_data_source(split=self._split, decoders=encoded or None)
                self.sha256 = self.sha256 or _hash_of(pathlib.Path(builder.data_path))
            except Exception as error:  # of many types, by what is missing
                raise UserError(
                    f"{self.file}: cannot be opened in {self.folder or 'the default folder'} "
                    f"({_first_line(error)}); prepare it as array_record or set TFDS_DATA_DIR"
                ) from None
        return self._source

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        record = {key: _plain(value) for key, value in self._open()[int(index)].items()}
        conversations = record.get("conversations")
        if isinstance(conversations, Mapping):
            columns = list(conversations)
            rows = zip(*conversations.values(), strict=True)
            record["conversations"] = [dict(zip(columns, row, strict=True)) for row in rows]
        elif isinstance(conversations, str):
            try:
                record["conversations"] = decode(conversations)
            except ValueError as error:
                raise UserError(
                    f"{self.file}: record {index}, field conversations: not JSON ({error}); prepare the set again"
                ) from None
        image = record.get("image")
        if image in ("", b""):
            del record["image"]
        return record

    def values(self) -> Iterator[Any]:
        """Returns all records in order; None for one that cannot be read."""
        return in_order(self)

    def without_pictures(self) -> Iterator[Any]:
        """Yields what `values` does; nothing where the images of the set are inside."""
        return iter(()) if self._embedded else self.values()

    def __getstate__(self) -> dict:
        return {**vars(self), "_source": None}


def _hash_of(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(f"{file.name}\0{file.stat().st_size}\n".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Returns a tfds value with text decoded and arrays as lists; image bytes stay bytes."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
