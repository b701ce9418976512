"""What a run writes down of every step: metrics.jsonl, and what its trackers are shown."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from etils import epath

from mole_jax.files import explained, is_remote, json_text, made, read_json_lines, write_json_lines
from mole_jax.training.trackers.tracker import Tracker

METRICS_FILE = "metrics.jsonl"
REMOTE_FLUSH_SECONDS = 30.0
"""Seconds between uploads where a file cannot be appended to."""
_OF_A_STEP = {"step": int}


class MetricsWriter:
    """Appends one JSON object per step to `workdir/metrics.jsonl` and shows the numbers to the `trackers`.

    With `resume_step`, lines of later steps are cut first (None: all lines), so that the file of a resumed
    run has the steps of one that never stopped. On a local disk each line is there when `write` returns;
    object stores have no append, so there the file is written whole every half minute and on `close`.
    Use as a context manager, on one process of a run; the trackers are closed with it.
    """

    def __init__(self, workdir: os.PathLike[str] | str, resume_step: int | None, trackers: Sequence[Tracker] = ()):
        self._trackers = trackers
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

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the `metrics` of `step`: numbers, zero-dimensional arrays, or strings (not for trackers).

        A NaN or an infinity becomes null in the JSON, which has no word for them.
        """
        values = {name: plain(value) for name, value in metrics.items() if name != "step"}
        record = {"step": int(step), **values}
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.numbers(step, numbers)
        if self._file is not None:
            with explained(self._path):
                self._file.write(json_text(record) + "\n")
                self._file.flush()
            return
        self._records.append(record)
        if time.monotonic() - self._uploaded > REMOTE_FLUSH_SECONDS:
            self.flush()

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Shows a PNG to the trackers."""
        for tracker in self._trackers:
            tracker.picture(step, name, png)

    def evaluation(
        self, step: int, result: Mapping[str, Any], answers: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        """Shows an evaluation to the trackers.

        Args:
            step: of the model.
            result: what `mole_jax.evaluation.runner.Evaluator.run` returns.
            answers: predictions of some questions of each task; none if the questions were not asked.
        """
        numbers = {
            f"held_out/{task}/{number}": values[number]
            for task, values in result["tasks"].items()
            for number in ("loss", "exact", "score")
            if values.get(number) is not None
        }
        for tracker in self._trackers:
            tracker.numbers(step, numbers)
            for task, lines in answers.items():
                if lines:
                    tracker.answers(step, f"answers/{task}", [_shown(line) for line in lines])

    def flush(self) -> None:
        """Makes all that was written visible to readers."""
        if self._remote:
            write_json_lines(self._path, self._records)
            self._uploaded = time.monotonic()
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Flushes and lets go of the file and the trackers."""
        try:
            self.flush()
        finally:
            with explained(self._path):
                if self._file is not None:
                    self._file.close()
            for tracker in self._trackers:
                tracker.close()

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


def plain(value: Any) -> Any:
    """A Python number of a NumPy or JAX scalar; anything else as it is."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return value.item()


def _shown(line: Mapping[str, Any]) -> dict[str, str]:
    """A row of a table of answers from a line of predictions."""
    return {
        "question": line["question"],
        "answer": line["prediction"],
        "references": " / ".join(line["references"]),
        "score": f"{line['score']:g}",
    }
