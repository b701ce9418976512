"""The files of a container that is several: named by a folder or a pattern, all of them there, and hashed."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence

from etils import epath

from mole_jax.errors import UserError
from mole_jax.files import PathLike, is_remote, path_of

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_OF = re.compile(r"^(.*?)-(\d{3,6})-of-(\d{3,6})(.*)$")
_WHOLE, _END = 16 * 2**20, 2**20


def is_pattern(path: str) -> bool:
    """Returns whether a path names several files: by ``{000..003}``, ``*`` or ``?``."""
    return bool(_RANGE.search(path)) or "*" in path or "?" in path


def expanded(path: str) -> list[epath.Path]:
    """Returns the files that a pattern names, in order.

    Raises:
      UserError: there is none, or one of a range is missing.
    """
    if _RANGE.search(path):
        files = [path_of(name) for name in _ranges(path)]
        if missing := [file for file in files if not file.exists()]:
            raise UserError(
                f"{path}: {len(missing)} of its {len(files)} files are missing, such as {missing[0].name}; correct the "
                "range or fetch them"
            )
        return files
    pattern = path_of(path)
    files = sorted(file for file in pattern.parent.glob(pattern.name) if file.is_file())
    if not files:
        raise UserError(f"{path}: no file fits this pattern; check the domain's path")
    check_complete(files, path)
    return files


def _ranges(path: str) -> list[str]:
    if (found := _RANGE.search(path)) is None:
        return [path]
    first, last = found[1], found[2]
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    names = [path[: found.start()] + number + path[found.end() :] for number in numbers]
    return list(itertools.chain.from_iterable(map(_ranges, names)))


def check_complete(files: Sequence[epath.Path], name: str) -> None:
    """Raises `UserError` where ``…-00001-of-00004`` in the files' names tells of others that are not there.

    Also where the files are of several sets, such as train and test.
    """
    sets: dict[str, tuple[int, set[int], epath.Path]] = {}
    for file in files:
        if found := _OF.match(file.name):
            _, numbers, _ = sets.setdefault(f"{found[1]}{found[4]} of {found[3]}", (int(found[3]), set(), file))
            numbers.add(int(found[2]))
    if len(sets) > 1:
        one, other, *_ = (file.name for _, _, file in sets.values())
        raise UserError(
            f"{name}: has the shards of several sets ({one}, {other}); name those of one by a pattern, such as "
            f"{_OF.sub(r'\1-*\4', one)}"
        )
    for count, numbers, file in sets.values():
        if len(numbers) < count:
            raise UserError(
                f"{name}: has {len(numbers)} of the {count} shards that {file.name} tells of; fetch the others"
            )


def check_local(name: str, kind: str) -> None:
    """Raises `UserError` if `name` is a URL, for a `kind` whose library reads files of this machine alone."""
    if is_remote(name):
        raise UserError(f"{name}: {kind} is not read from a bucket; copy it to this machine and name it there")


def content_hash(files: Sequence[PathLike]) -> str:
    """Returns a hash of names, sizes and contents.

    Of a file over 16 MiB the first and the last MiB count alone: the end of a parquet or ArrayRecord file says
    where each of its parts lies and how long it is. A change within it that moves nothing is not noticed.
    """
    digest = hashlib.sha256()
    for file in map(path_of, files):
        size = file.stat().length
        digest.update(f"{file.name}\0{size}\n".encode("utf-8", "surrogateescape"))
        with file.open("rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
            else:
                digest.update(stream.read(_END))
                stream.seek(size - _END)
                digest.update(stream.read())
    return digest.hexdigest()
