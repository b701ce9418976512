"""TensorBoard's event file, written by the thread that has the numbers.

tensorboardX's own writer has a thread behind a queue. On a full disk that thread dies without a word and whoever fills
the queue waits for ever; here the write itself fails.
"""

from __future__ import annotations

import functools
import io
import socket
import struct
import time
import types
from typing import IO, Any

import numpy as np
from etils import epath

from mole_jax.files import explained, is_remote, made, write_bytes


class EventFile:
    """A new file of events in a folder. Object stores cannot append, so there `flush` writes it whole."""

    def __init__(self, folder: epath.Path, purge_step: int):
        """Opens it; TensorBoard hides what earlier files say of `purge_step` and later steps.

        Raises:
            UserError: the file cannot be written.
        """
        self._purge_step: int | None = purge_step
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        made(folder)
        with explained(self._path):
            self._stream: IO[bytes] = io.BytesIO() if is_remote(folder) else open(self._path, "wb")  # noqa: SIM115

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a number."""
        self._add(step=step, summary=_writing().summary.scalar(name, value))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Adds a picture, (H, W, 3) uint8."""
        self._add(step=step, summary=_writing().summary.image(name, pixels, dataformats="HWC"))

    def text(self, name: str, markdown: str, step: int) -> None:
        """Adds a text."""
        self._add(step=step, summary=_writing().summary.text(name, markdown))

    def flush(self) -> None:
        """Makes all events visible to readers.

        Raises:
            UserError: the file cannot be written.
        """
        self._begin()
        if isinstance(self._stream, io.BytesIO):
            write_bytes(self._path, self._stream.getvalue())
            return
        with explained(self._path):
            self._stream.flush()

    def close(self) -> None:
        """Flushes and lets go of the file."""
        try:
            self.flush()
        finally:
            with explained(self._path):
                self._stream.close()

    def _begin(self) -> None:
        """Writes what a file begins with: its version, and from which step on earlier files do not count."""
        if (step := self._purge_step) is not None:
            self._purge_step, log = None, _writing().event_pb2.SessionLog
            self._add(file_version="brain.Event:2")
            self._add(step=step, session_log=log(status=log.START))

    def _add(self, **event: Any) -> None:
        self._begin()
        tensorboardX = _writing()
        # The TFRecord format: length, its checksum, the content, its checksum.
        content = tensorboardX.event_pb2.Event(wall_time=time.time(), **event).SerializeToString()
        length = struct.pack("<Q", len(content))
        checks = (struct.pack("<I", tensorboardX.masked_crc32c(part)) for part in (length, content))
        with explained(self._path):
            self._stream.write(length + next(checks) + content + next(checks))


@functools.cache
def _writing() -> Any:
    """Returns what is used of tensorboardX, which takes half a second to import: not before the first step."""
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    return types.SimpleNamespace(summary=summary, event_pb2=event_pb2, masked_crc32c=masked_crc32c)
