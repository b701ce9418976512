"""A disk that is full: a small tmpfs in a mount namespace of its own, which needs no root."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")
LARGE_KIB = 65536


class SmallDisk:
    """A disk of some KiB at `path`, for commands behind `wrap`; this process sees its files under `files`."""

    def __init__(self, path: Path, kib: float):
        path.mkdir()
        self.path = path
        mount = 'mount -t tmpfs -o size="$1" tmpfs "$0" && echo mounted && read -r _'
        self._holder = subprocess.Popen(
            [*UNSHARE, "sh", "-c", mount, str(path), str(int(1024 * kib))],
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

    def make_space(self) -> None:
        """As a user does who deletes something else."""
        (self.files / "filler").unlink(missing_ok=True)
        remount = ("mount", "-o", f"remount,size={LARGE_KIB}k", str(self.path))
        subprocess.run([*self.wrap, *remount], check=True, capture_output=True)

    def fill(self, _: subprocess.Popen) -> float:
        """Takes all space that is left; returns when that was done (`time.monotonic`)."""
        subprocess.run(
            [*self.wrap, "sh", "-c", 'exec 2>/dev/null; cat /dev/zero > "$0/filler"; true', str(self.path)], check=True
        )
        return time.monotonic()

    def close(self) -> None:
        self._holder.communicate("\n")


class LimitedFiles:
    """A folder where files may not be larger than some KiB (RLIMIT_FSIZE): what else a kernel can refuse to write."""

    def __init__(self, path: Path, kib: float):
        path.mkdir(exist_ok=True)
        self.path = self.files = path
        # The soft limit alone: without CAP_SYS_RESOURCE nobody may raise the hard one again, not even to what it was.
        self.wrap = ("prlimit", f"--fsize={int(1024 * kib)}:", "--")

    def make_space(self) -> None:
        self.wrap = ()

    def fill(self, process: subprocess.Popen) -> float:
        """From now on the process cannot make a file longer."""
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
        return time.monotonic()

    def close(self) -> None:
        pass


def why_not_mountable() -> str | None:
    """Returns why this kernel does not let its users mount a tmpfs, or None if it does."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            SmallDisk(Path(folder) / "trial", 64).close()
        except OSError as error:
            return str(error)
    return None


@contextlib.contextmanager
def full(kind: str, path: Path, *, disk: float, files: float) -> Iterator[SmallDisk | LimitedFiles]:
    """Gives a disk of `disk` KiB (`kind` tmpfs), or files of at most `files` KiB (`kind` limit).

    Where nothing can be mounted, it gives the latter in place of the former, and a warning.
    """
    if kind == "tmpfs" and (why := why_not_mountable()):
        warnings.warn(f"{why}; the size of files is limited instead (RLIMIT_FSIZE)", stacklevel=3)
        kind = "limit"
    made = SmallDisk(path, disk) if kind == "tmpfs" else LimitedFiles(path, files)
    try:
        yield made
    finally:
        made.close()
