"""A disk that is full: a small tmpfs in a mount namespace of its own, which needs no root."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")


class SmallDisk:
    """A disk of some KiB at `path`, for commands behind `wrap`; this process sees its files under `files`."""

    def __init__(self, path: Path, kib: int):
        path.mkdir()
        self.path = path
        mount = 'mount -t tmpfs -o size="$1"k tmpfs "$0" && echo mounted && read -r _'
        self._holder = subprocess.Popen(
            [*UNSHARE, "sh", "-c", mount, str(path), str(kib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "mounted\n":
            _, why = self._holder.communicate()
            raise OSError(f"no tmpfs can be mounted here: {why.strip()}")
        self.wrap = ("nsenter", "--preserve-credentials", "--user", "--mount", f"--target={self._holder.pid}", "--")
        self.files = Path(f"/proc/{self._holder.pid}/root{path}")

    def resize(self, kib: int) -> None:
        """Makes space, as a user does who deletes something else."""
        remount = ("mount", "-o", f"remount,size={kib}k", str(self.path))
        subprocess.run([*self.wrap, *remount], check=True, capture_output=True)

    def fill(self) -> float:
        """Takes all space that is left; returns when it was done (`time.monotonic`)."""
        fill = 'exec 2>/dev/null; cat /dev/zero > "$0/filler"; true'
        subprocess.run([*self.wrap, "sh", "-c", fill, str(self.path)], check=True)
        return time.monotonic()

    def empty(self) -> None:
        """Gives back what `fill` took."""
        (self.files / "filler").unlink()

    def close(self) -> None:
        self._holder.communicate("\n")


class LimitedFiles:
    """Where nothing can be mounted: a folder whose files may have so many KiB each (RLIMIT_FSIZE)."""

    def __init__(self, path: Path, kib: int):
        path.mkdir()
        self.path = self.files = path
        self.resize(kib)

    def resize(self, kib: int) -> None:
        self.wrap = ("prlimit", f"--fsize={1024 * kib}", "--")

    def close(self) -> None:
        pass


def mountable() -> bool:
    """Tells whether this kernel lets its users mount a tmpfs; where it does not, that is a warning of the test."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            SmallDisk(Path(folder) / "trial", 64).close()
        except OSError as error:
            warnings.warn(f"{error}; files are limited in size instead (RLIMIT_FSIZE)", stacklevel=2)
            return False
    return True


@contextlib.contextmanager
def small_disk(path: Path, kib: int) -> Iterator[SmallDisk | LimitedFiles]:
    disk = SmallDisk(path, kib) if mountable() else LimitedFiles(path, kib)
    try:
        yield disk
    finally:
        disk.close()
