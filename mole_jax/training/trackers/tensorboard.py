"""TensorBoard: an event file in the run's folder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image

from mole_jax.training.trackers.events import EventFile

FOLDER = "tensorboard"


class TensorBoard:
    """A `Tracker` that writes events which TensorBoard shows; answers are a table in its text tab."""

    def __init__(self, workdir: epath.Path, first_step: int):
        """Opens the file; what earlier ones say of `first_step` and later steps is hidden: it will be taken again."""
        self._events = EventFile(workdir / FOLDER, first_step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.scalar(name, value, step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        self._events.image(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), step)

    def answers(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(_cell, row.values()) for row in rows)]
        self._events.text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def _cell(text: str) -> str:
    """Returns text as it stands in a cell of a Markdown table, where a bar would end it."""
    return " ".join(text.split()).replace("|", "\\|")
