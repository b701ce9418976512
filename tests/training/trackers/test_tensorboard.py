"""TensorBoard's events: what is shown is in them, and what a resumed run takes again is hidden."""

from __future__ import annotations

import struct

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from mole_jax.files import absolute
from mole_jax.training.trackers.tensorboard import TensorBoard


def test_events_are_hidden_from_the_first_step_on(tmp_path):
    """The first record names the file's version, the second is the mark from which earlier files do not count."""
    board = TensorBoard(absolute(tmp_path), 5)
    board.numbers(5, {"loss": 0.25})
    board.answers(5, "answers/general", [{"question": "a | b?", "answer": "two\nlines"}])
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    version, start, number, text = events_of(file)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, event_pb2.SessionLog.START)
    assert (number.step, number.summary.value[0].tag, number.summary.value[0].simple_value) == (5, "loss", 0.25)
    table = text.summary.value[0].tensor.string_val[0].decode()
    assert table == "| question | answer |\n| --- | --- |\n| a \\| b? | two lines |"


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
