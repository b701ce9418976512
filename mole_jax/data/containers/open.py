"""Which container a path is."""

from __future__ import annotations

from mole_jax.data.containers.container import Records
from mole_jax.data.containers.json_file import FileRecords
from mole_jax.data.containers.tfds import TFDS, TfdsRecords
from mole_jax.files import path_of


def open_records(path: str) -> Records:
    """Opens the records at `path`: a JSON or JSONL file, or `tfds:NAME:SPLIT`.

    Raises:
      UserError: there is nothing to read, or nothing that is known; the message names the file.
    """
    return TfdsRecords(path) if path.startswith(TFDS) else FileRecords(path)


def image_root(path: str, root: str | None) -> str | None:
    """Returns the folder of a container's images: `root`, or the folder of `path` where that is a file."""
    if root is not None:
        return root
    return None if path.startswith(TFDS) else str(path_of(path).parent)
