"""Files of a run: written whole or not at all, read with one clear line, on a disk or a bucket."""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from etils import epath

from mole_jax.errors import UserError
from mole_jax.forms import misfit

PathLike = str | os.PathLike[str]

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EACCES: "give this user the right to write there or choose another folder",
    errno.EPERM: "give this user the right to write there or choose another folder",
    errno.EROFS: "choose a folder that is not read-only",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EISDIR: "a folder has this name; move it away or choose another name",
    errno.ENOENT: "make the folder first or choose another one",
    errno.EEXIST: "a file has this name; move it away or choose another folder",
    errno.ELOOP: "its links lead in a circle; choose another folder",
    errno.EFBIG: "files may not be that large here (ulimit -f); raise that or choose another folder",
}

SCHEMES = ("gs", "s3", "az", "hf")
"""Of the URLs that a path may be."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

_STORES = {"aiohttp", "botocore", "gcsfs", "google", "s3fs"}
"""Libraries of buckets, whose errors are no `OSError`s."""


def absolute(name: PathLike) -> epath.Path:
    """Returns a path that does not depend on the working directory; URLs such as ``gs://…`` stay as they are.

    Raises:
        UserError: the name is empty, has a zero byte, or is a URL of an unknown kind.
    """
    path = path_of(name)
    return path if is_remote(path) else epath.Path(os.path.abspath(name))


def path_of(name: PathLike) -> epath.Path:
    """Returns a path as a user wrote it, of a disk or a bucket.

    Raises:
        UserError: the name is empty, has a zero byte, or is a URL of an unknown kind.
    """
    if not os.fspath(name) or "\0" in os.fspath(name):
        raise UserError(f"{os.fspath(name)!r} is no name of a folder or file; name one (. is the folder you are in)")
    # Through pathlib, or epath takes any :// within a name for a URL's.
    return epath.Path(name if is_remote(name) else pathlib.Path(name))


def local(name: PathLike) -> pathlib.Path:
    """Returns `name` as a path on this machine, for what is not written to or read from buckets.

    Raises:
        UserError: the name is empty, has a zero byte, or is a URL.
    """
    if is_remote(path_of(name)):
        raise UserError(f"{os.fspath(name)}: is a URL; name a folder or file of this machine here")
    return pathlib.Path(os.path.normpath(name))


def is_remote(path: PathLike) -> bool:
    """Tells whether the path is a URL: such a store writes objects whole and cannot append to them.

    Raises:
        UserError: it is a URL of a kind that is not in `SCHEMES`.
    """
    found = _URL.match(os.fspath(path))
    if found and found[1] not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise UserError(f"{os.fspath(path)}: a path cannot begin with {found[0]}; name one on a disk, or of {known}")
    return bool(found)


def read_json(path: PathLike, form: Any = dict, *, remedy: str = "") -> Any:
    """Returns the JSON value in a file: an object, or of another `form` (`mole_jax.forms`).

    Args:
        path: the file.
        form: what the value must be.
        remedy: what the user can do if the file is damaged, for the message.

    Raises:
        UserError: there is no such file, or it holds no such value (cut off, damaged, another thing).
    """
    mend = remedy and f"; {remedy}"
    try:
        value = json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{mend}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}){mend}") from None
    if wrong := misfit(value, form):
        raise UserError(f"{path}: is not as it was written ({wrong}){mend}")
    return value


def read_json_lines(path: PathLike, form: Any = dict) -> list[dict[str, Any]]:
    """Returns the objects of a file with one on each line; a last line that a kill cut short is left out.

    Args:
        path: the file.
        form: what each object must be (`mole_jax.forms`).

    Raises:
        UserError: the file cannot be read, or another line is no such object.
    """
    try:
        content = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); move it away") from None
    # Split at line feeds alone: JSON may hold other characters that Python takes for line breaks.
    *lines, rest = content.split(b"\n")
    found = []
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        try:
            value = json.loads(line)
            if wrong := misfit(value, form):
                raise ValueError(wrong)
        except (ValueError, RecursionError) as error:
            if number > len(lines):
                break
            raise UserError(
                f"{path}: line {number} is not as it was written ({error}); delete that line, or move the file away"
            ) from None
        found.append(value)
    return found


_LFS = b"version https://git-lfs.github.com/spec/"


def check_no_pointer(path: PathLike) -> None:
    """Raises `UserError` if a file is what git leaves in place of a large one that was not fetched."""
    with epath.Path(path).open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise UserError(f"{path}: is a Git LFS pointer in place of the file; fetch it with git lfs pull")


def write_json_lines(path: PathLike, values: Iterable[Mapping[str, Any]]) -> None:
    """Writes objects one on each line, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, "".join(json_text(value) + "\n" for value in values))


def write_json(path: PathLike, value: Any, *, indent: int = 1) -> None:
    """Writes `value` as JSON, whole or not at all; NaN and infinity, which JSON does not have, become null.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, json_text(value, indent=indent) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Returns `value` as JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path) as stream:
        stream.write(content)


@contextmanager
def writing(path: PathLike) -> Iterator[IO[bytes]]:
    """Opens a file that gets its name when the block ends well; until then an older one of that name stays.

    Raises:
        UserError: the file cannot be written.
    """
    if is_remote(path):
        # A bucket has no renaming in one move, and needs none: an object appears when its stream is closed.
        with explained(path):
            upload: Any = epath.Path(path).open("wb")
            try:
                yield upload
            except BaseException:
                # Or the last reference would close it, and half of an object appear. Of what was sent nothing is kept.
                upload.closed = True
                raise
            upload.close()
        return
    final = pathlib.Path(path)
    partial = final.with_name(f".{final.name}.partial")
    with explained(path):
        try:
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(final)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def made[Folder: os.PathLike[str]](folder: Folder) -> Folder:
    """Makes a folder where it is not there yet, with those above it, and returns it; a bucket needs none.

    Raises:
        UserError: it cannot be made; of those above it none is left that was made for it.
    """
    if not is_remote(folder):
        with explained(folder):
            path = pathlib.Path(folder)
            new = [one for one in path.parents if not os.path.lexists(one)]
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError:
                for one in new:
                    with suppress(OSError):  # it was not made, or another process has put something there
                        one.rmdir()
                raise
    return folder


@contextmanager
def whole_folder(folder: PathLike) -> Iterator[pathlib.Path]:
    """Makes a folder that gets its name when the block ends well; until then its files lie in a hidden one beside it.

    Raises:
        UserError: there is something in a folder of that name, it cannot be made, or it is a URL.
    """
    final = local(folder)
    with explained(folder):
        if os.path.lexists(final) and (not final.is_dir() or any(final.iterdir())):
            raise UserError(f"{folder}: is there already and not empty; delete it or choose another folder")
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        made(partial)
        try:
            yield partial
            for file in partial.iterdir():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            partial.replace(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def explained(path: PathLike) -> Iterator[None]:
    """Turns an `OSError` of the block, as on a full or read-only disk, into a `UserError` that names `path`.

    Of a bucket also the errors of its library.
    """
    try:
        yield
    except Exception as error:
        if is_remote(path) and (isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _STORES):
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(
                f"{path}: cannot be written ({why}); look at the name of the bucket and at your credentials"
            ) from None
        if not isinstance(error, OSError):
            raise
        at = os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else os.fspath(path)
        if error.errno in (errno.EEXIST, errno.ENOENT) and os.path.islink(at) and not os.path.exists(at):
            raise UserError(
                f"{path}: cannot be written ({at} is a link to {os.readlink(at)}, which is not there); remove the link "
                "or make what it names"
            ) from None
        remedy = _REMEDIES.get(error.errno or 0, "look at the disk or choose another folder")
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
