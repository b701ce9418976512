"""The folder that a command writes to: made, tried, and kept from a second process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from mole_jax.errors import UserError
from mole_jax.files import explained, is_remote, made

LOCK = ".lock"


@contextmanager
def claimed(folder: epath.Path) -> Iterator[None]:
    """Makes the folder and holds it for as long as the body runs; the lock of a process that was killed holds nothing.

    A bucket knows no locks: there it is only tried.

    Raises:
        UserError: the folder cannot be made or written to, or another process has it (the message names host and pid).
    """
    if is_remote(folder):
        _try(folder / LOCK)
        yield
        return
    with explained(made(folder) / LOCK):
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)  # and with it goes the lock


def _try(file: epath.Path) -> None:
    try:
        file.write_text(_me())
    except Exception as error:  # each store's library has errors of its own
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{file.parent}: cannot be written ({type(error).__name__}: {why}); look at the name of the bucket and at "
            "your credentials"
        ) from None


def _me() -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname()})


def _lock(descriptor: int, folder: epath.Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: {_holder(descriptor)} works there; wait for it or choose another --workdir"
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder}: its file system cannot lock files ({error.strerror}); choose another --workdir"
        ) from None
    with explained(folder / LOCK):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _me().encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not written its name yet
