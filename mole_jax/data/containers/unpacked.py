"""Compressed files, unpacked once into a cache folder: nothing can be read from the middle of one."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import IO, Any

from mole_jax.errors import UserError
from mole_jax.files import PathLike, explained, made, path_of, writing
from mole_jax.terminal import escaped

_CHUNK = 2**20


def _zstd(file: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


FORMATS: Mapping[bytes, tuple[str, str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", ".gz", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", ".bz2", bz2.BZ2File),
    b"\xfd7zXZ": ("xz", ".xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst", _zstd),
}
"""First bytes of a compressed file to name, suffix and reader."""


def is_compressed(first: bytes) -> bool:
    """Returns whether a file that begins with `first` is compressed by one of `FORMATS`."""
    return first.startswith(tuple(FORMATS))


def cache_folder() -> pathlib.Path:
    """Returns where unpacked files are kept: `mole_jax/unpacked` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(home).expanduser() / "mole_jax" / "unpacked"


def unpacked(path: PathLike) -> pathlib.Path:
    """Returns the unpacked copy of a compressed file, in a folder named by the content; makes it where it is not there.

    Says on stderr where it is, for it takes disk space that the user may want back.

    Raises:
      UserError: the file is cut short or damaged, cannot be read, or there is no room for the copy.
    """
    source = path_of(path)
    try:
        with source.open("rb") as file:
            first = file.read(8)
            name, suffix, reader = next(form for magic, form in FORMATS.items() if first.startswith(magic))
            file.seek(0)
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    target = cache_folder() / digest.hexdigest()[:32] / source.name.removesuffix(suffix)
    if target.exists():
        return target
    made(target.parent)
    # Of its own name, as another process may be doing the same.
    own = target.with_name(f"{os.getpid()}.{target.name}")
    try:
        with source.open("rb") as file, writing(own) as copy:
            _copy(reader(file), copy, f"{path}: is compressed by {name} and")
        with explained(target):
            own.replace(target)
    except BaseException:
        own.unlink(missing_ok=True)
        raise
    size = target.stat().st_size / 2**20
    print(escaped(f"{path}: unpacked to {target} ({size:,.1f} MiB), which later starts take"), file=sys.stderr)
    return target


def _copy(packed: Any, copy: IO[bytes], what: str) -> None:
    while True:
        try:
            chunk = packed.read(_CHUNK)
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise UserError(
                f"{what} cannot be unpacked ({' '.join(str(error).split())}); it is cut short or damaged, fetch it "
                "again"
            ) from None
        if not chunk:
            return
        copy.write(chunk)
