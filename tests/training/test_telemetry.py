"""What a run writes down: whole after a resume, readable while it runs, honest about NaN."""

from __future__ import annotations

import io
import json

import numpy as np
from etils import epath

from mole_jax.training import telemetry
from mole_jax.training.telemetry import MetricsWriter, read_metrics


def metrics(step: int) -> dict:
    return {"loss": 1 / step, "loss/general": np.float32(0.5), "tokens_per_second": 1000 * step}


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    with MetricsWriter(tmp_path / "whole", None) as writer:
        for step in range(1, 9):
            writer.write(step, metrics(step))
    with MetricsWriter(tmp_path / "cut", None) as writer:
        for step in range(1, 7):  # two steps past the checkpoint that is resumed from
            writer.write(step, {"loss": -1.0} if step > 4 else metrics(step))
    with MetricsWriter(tmp_path / "cut", 4) as writer:
        for step in range(5, 9):
            writer.write(step, metrics(step))
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert [record["step"] for record in read_metrics(tmp_path / "cut")] == list(range(1, 9))


def test_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsWriter(tmp_path, None).close()
    assert read_metrics(tmp_path) == []


def test_line_is_there_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path), None)
    writer.write(1, metrics(1))
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0, "loss/general": 0.5, "tokens_per_second": 1000}]
    writer.close()


def test_line_cut_by_a_crash_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    with MetricsWriter(tmp_path, 2) as writer:
        writer.write(3, {})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]


def test_nan_is_valid_json(tmp_path):
    with MetricsWriter(tmp_path, None) as writer:
        writer.write(1, {"loss": float("nan"), "mfu": np.float32("inf"), "note": "skipped"})

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "mfu": None, "note": "skipped"}


class Shown:
    """A tracker that keeps what it is given."""

    def __init__(self):
        self.got = []

    def __getattr__(self, name):
        return lambda *given: self.got.append((name, *given))


def test_trackers_get_numbers_answers_and_the_end(tmp_path):
    shown = Shown()
    result = {
        "tasks": {"general": {"loss": 2.5, "exact": 0.25, "score": 0.5}, "document": {"loss": 3.0, "score": None}}
    }
    line = {"question": "How many?", "prediction": "two", "references": ["two", "2"], "score": 1.0, "id": "a"}
    with MetricsWriter(tmp_path, None, [shown]) as writer:
        writer.write(7, {"step": 7, "loss": np.float32(0.5), "note": "skipped"})
        writer.evaluation(7, result, {"general": [line], "document": []})
    row = {"question": "How many?", "answer": "two", "references": "two / 2", "score": "1"}
    assert shown.got == [
        ("numbers", 7, {"loss": 0.5}),
        (
            "numbers",
            7,
            {
                "held_out/general/loss": 2.5,
                "held_out/general/exact": 0.25,
                "held_out/general/score": 0.5,
                "held_out/document/loss": 3.0,
            },
        ),
        ("answers", 7, "answers/general", [row]),
        ("flush",),
        ("close",),
    ]


def test_remote_file_is_rewritten_whole(monkeypatch):
    class Upload(io.BytesIO):
        """An object that appears when its stream is closed."""

        def __init__(self, file):
            super().__init__()
            self.file = file

        def close(self):
            self.file.text, self.file.writes = self.getvalue().decode(), self.file.writes + 1
            super().close()

    class Remote:
        """A file that can only be read and written whole."""

        def __init__(self):
            self.text, self.parent, self.writes = '{"step": 1}\n{"step": 2}\n', self, 0

        def __fspath__(self):
            return "gs://bucket/run"

        def __truediv__(self, _):
            return self

        def mkdir(self, **_):
            pass

        def exists(self):
            return True

        def read_bytes(self):
            return self.text.encode()

        def open(self, mode):
            assert mode == "wb"
            return Upload(self)

    remote = Remote()
    monkeypatch.setattr(epath, "Path", lambda _: remote)
    with MetricsWriter("gs://bucket/run", 1) as writer:
        writer.write(2, {"loss": 0.5})
        assert remote.text == '{"step": 1}\n'
        before = remote.writes
        monkeypatch.setattr(telemetry, "REMOTE_FLUSH_SECONDS", -1.0)
        writer.write(3, {})
        assert remote.writes == before + 1
    assert remote.text == '{"step": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3}\n'
