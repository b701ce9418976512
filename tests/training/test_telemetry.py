"""What a run writes down: whole after a resume, readable while it runs, honest about NaN."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from mole_jax.training import telemetry
from mole_jax.training.telemetry import MetricsWriter, Progress, describe, read_metrics


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


def test_tensorboard_has_the_numbers(tmp_path):
    with MetricsWriter(tmp_path, None) as writer:
        writer.write(7, metrics(7))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss/general" in events.read_bytes()


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

    class NoEvents:
        def __init__(self, *_):
            self.scalar = lambda *_: None
            self.flush = self.close = lambda: None

    remote = Remote()
    monkeypatch.setattr(epath, "Path", lambda _: remote)
    monkeypatch.setattr(telemetry, "EventFile", NoEvents)
    with MetricsWriter("gs://bucket/run", 1) as writer:
        writer.write(2, {"loss": 0.5})
        assert remote.text == '{"step": 1}\n'
        before = remote.writes
        monkeypatch.setattr(telemetry, "REMOTE_FLUSH_SECONDS", -1.0)
        writer.write(3, {})
        assert remote.writes == before + 1
    assert remote.text == '{"step": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3}\n'


def test_tensorboard_hides_what_will_be_taken_again(tmp_path):
    """The first record names the file's version, the second is the mark from which earlier files do not count."""
    with MetricsWriter(tmp_path, 4) as writer:
        writer.write(5, {"loss": 0.25})
    (file,) = (tmp_path / "tensorboard").iterdir()
    version, start, number = events_of(file)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, event_pb2.SessionLog.START)
    assert (number.step, number.summary.value[0].tag, number.summary.value[0].simple_value) == (5, "loss", 0.25)


def events_of(file):
    """The events of a TFRecord file: length, checksum, content, checksum."""
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert struct.unpack("<I", content[8:12])[0] == masked_crc32c(content[:8])
        found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        assert struct.unpack("<I", content[12 + length : 16 + length])[0] == masked_crc32c(content[12 : 12 + length])
        content = content[16 + length :]
    return found


def test_description_is_short_and_leaves_out_absent_domains():
    line = describe({"loss": 1.23456, "loss/biomedical": 2.0, "loss/document": None, "tokens_per_second": 12345.6})
    assert line == "loss 1.235 (biomedic 2.00) 12,346 tok/s"
    assert describe({}) == ""


@pytest.mark.parametrize(("every", "lines"), [(0.0, 3), (1000.0, 2)])
def test_plain_lines_come_every_so_often_and_at_the_end(every, lines):
    stream = io.StringIO()
    progress = Progress(3, every_seconds=every, stream=stream)
    for step in (1, 2, 3):
        progress.update(step, metrics(step))
    progress.close()
    shown = stream.getvalue().splitlines()
    assert len(shown) == lines
    assert shown[-1] == "step 3/3  loss 0.333 (general 0.50) 3,000 tok/s"


def test_of_several_processes_one_speaks():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(3, stream=stream, show=False)
    progress.update(3, metrics(3))
    progress.say("hello")
    progress.close()
    assert stream.getvalue() == ""


def test_bar_on_a_terminal_starts_where_the_run_resumes():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(10, start=4, stream=stream)
    progress.update(5, metrics(5))
    progress.say("hello")
    progress.close()
    assert "5/10" in stream.getvalue()
    assert "loss 0.200" in stream.getvalue()
    assert "hello\n" in stream.getvalue()
