"""What a run writes down of every step: metrics.jsonl, TensorBoard events and a line on the screen."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from mole_jax.files import explained, is_remote, json_text, made, read_json_lines, write_json_lines
from mole_jax.terminal import escaped, warning
from mole_jax.training.tensorboard import EventFile

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
REMOTE_FLUSH_SECONDS = 30.0
"""Seconds between uploads where a file cannot be appended to."""
_DOMAIN_LETTERS = 8
_OF_A_STEP = {"step": int}


class MetricsWriter:
    """Appends one JSON object per step to `workdir/metrics.jsonl` and the numbers to TensorBoard.

    With `resume_step`, lines of later steps are cut first (None: all lines), so that the file of a resumed
    run has the steps of one that never stopped. On a local disk each line is there when `write` returns;
    object stores have no append, so there the file is written whole every half minute and on `close`.
    Use as a context manager, on one process of a run.
    """

    def __init__(self, workdir: os.PathLike[str] | str, resume_step: int | None):
        self._path = epath.Path(workdir) / METRICS_FILE
        made(self._path.parent)
        before = read_metrics(workdir) if resume_step is not None and self._path.exists() else []
        kept = [record for record in before if record["step"] <= (resume_step or 0)]
        self.missing = range(kept[-1]["step"] + 1 if kept else 1, (resume_step or 0) + 1)
        """Steps before the first one to come that have no line: not due, or lost with the end of the file."""
        write_json_lines(self._path, kept)
        self._remote = is_remote(self._path)
        self._records = kept if self._remote else []
        self._uploaded = time.monotonic()
        with explained(self._path):
            self._file: TextIO | None = None if self._remote else open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        # Events of steps that will be taken again are hidden by TensorBoard from this step on.
        self._events = EventFile(
            epath.Path(workdir) / TENSORBOARD_FOLDER, 0 if resume_step is None else resume_step + 1
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the `metrics` of `step`: numbers, zero-dimensional arrays, or strings (not for TensorBoard).

        A NaN or an infinity becomes null in the JSON, which has no word for them.
        """
        record: dict[str, Any] = {"step": int(step)}
        for name, value in metrics.items():
            if name == "step":
                continue
            record[name] = plain = _plain(value)
            if isinstance(plain, (int, float)):
                self._events.scalar(name, plain, step)
        if self._file is not None:
            with explained(self._path):
                self._file.write(json_text(record) + "\n")
                self._file.flush()
            return
        self._records.append(record)
        if time.monotonic() - self._uploaded > REMOTE_FLUSH_SECONDS:
            self.flush()

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Shows a PNG in TensorBoard."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._events.image(name, pixels, step)

    def flush(self) -> None:
        """Makes all that was written visible to readers."""
        if self._remote:
            write_json_lines(self._path, self._records)
            self._uploaded = time.monotonic()
        self._events.flush()

    def close(self) -> None:
        """Flushes and lets go of the files."""
        try:
            self.flush()
        finally:
            with explained(self._path):
                if self._file is not None:
                    self._file.close()
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(workdir: os.PathLike[str] | str) -> list[dict[str, Any]]:
    """The objects of `workdir/metrics.jsonl` in order; a last line cut short by a crash is left out."""
    return read_json_lines(epath.Path(workdir) / METRICS_FILE, _OF_A_STEP)


def record_events(file: epath.Path, step: int, events: Sequence[Mapping[str, Any]]) -> None:
    """Adds what happened at `step` to a file of JSON lines, each with its ``step``.

    A resumed run takes steps again: their earlier events go.
    """
    before = read_json_lines(file, _OF_A_STEP) if file.exists() else []
    write_json_lines(file, [*(one for one in before if one["step"] < step), *({"step": step, **one} for one in events)])


def _plain(value: Any) -> Any:
    """A Python number of a NumPy or JAX scalar; anything else as it is."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return value.item()


class Progress:
    """Steps, losses and speed on stderr: a bar on a terminal, a plain line every so often elsewhere.

    `total` and `start` are steps; `every_seconds` is the least time between two plain lines. Without `show`
    nothing is said: of several processes one speaks. Of several runs at once each has its `prefix` before every line,
    and one has `show_steps`.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        every_seconds: float = 10.0,
        stream: TextIO | None = None,
        show: bool = True,
        show_steps: bool = True,
        prefix: str = "",
    ):
        self._show, self._stream = show, stream if stream is not None else sys.stderr
        self._show_steps, self._prefix = show and show_steps, prefix
        self._total, self._every, self._last = total, every_seconds, -math.inf
        self._bar = None
        if self._show_steps and self._stream.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=self._stream)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows that `step` is done, with the `metrics` that `MetricsWriter.write` takes."""
        if not self._show_steps:
            return
        text = escaped(describe(metrics))
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= self._every or step >= self._total:
            self._last = now
            print(f"{self._prefix}step {step}/{self._total}  {text}", file=self._stream, flush=True)

    def say(self, text: str, *, warn: bool = False) -> None:
        """Prints a line without breaking the bar, which may be another run's; what it quotes from a file is escaped.

        With `warn` it is coloured where the stream is a terminal.
        """
        text = escaped(self._prefix + text)
        if self._show:
            tqdm.write(warning(text, self._stream) if warn else text, file=self._stream)
            self._stream.flush()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def describe(metrics: Mapping[str, Any]) -> str:
    """One short line: loss, the loss of each domain (its name cut short), tokens per second."""
    shown = []
    if metrics.get("loss") is not None:
        shown.append(f"loss {_plain(metrics['loss']):.3f}")
    losses = {name.removeprefix("loss/"): _plain(value) for name, value in metrics.items() if name.startswith("loss/")}
    present = [(name, value) for name, value in losses.items() if value is not None and math.isfinite(value)]
    if present:
        shown.append(f"({' '.join(f'{name[:_DOMAIN_LETTERS]} {value:.2f}' for name, value in present)})")
    if metrics.get("tokens_per_second") is not None:
        shown.append(f"{_plain(metrics['tokens_per_second']):,.0f} tok/s")
    return " ".join(shown)
