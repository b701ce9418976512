"""TensorBoard's event file, written by the thread that has the numbers.

tensorboardX's own writer has a thread behind a queue. On a full disk that thread dies, the queue fills, and training
waits for ever; here the write itself fails.
"""

from __future__ import annotations

import io
import socket
import struct
import time
from typing import IO, Any

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from mole_jax.files import explained, is_remote, made, write_bytes

events: Any = event_pb2
"""Its classes are made at import, where no type checker sees them."""


class EventFile:
    """A new file of events in a folder. Object stores cannot append, so there `flush` writes it whole."""

    def __init__(self, folder: epath.Path, purge_step: int):
        """Opens it; TensorBoard hides what earlier files say of `purge_step` and later steps.

        Raises:
            UserError: the file cannot be written.
        """
        now = time.time()
        self._path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        made(folder)
        with explained(self._path):
            self._stream: IO[bytes] = io.BytesIO() if is_remote(folder) else open(self._path, "wb")  # noqa: SIM115
        self._write(events.Event(wall_time=now, file_version="brain.Event:2"))
        self._write(
            events.Event(wall_time=now, step=purge_step, session_log=events.SessionLog(status=events.SessionLog.START))
        )

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a number."""
        self._write(events.Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value)))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Adds a picture, (H, W, 3) uint8."""
        shown = summary.image(name, pixels, dataformats="HWC")
        self._write(events.Event(wall_time=time.time(), step=step, summary=shown))

    def flush(self) -> None:
        """Makes all events visible to readers.

        Raises:
            UserError: the file cannot be written.
        """
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

    def _write(self, event: Any) -> None:
        # The TFRecord format: length, its checksum, the content, its checksum.
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        with explained(self._path):
            self._stream.write(length + next(checks) + content + next(checks))
