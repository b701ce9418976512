"""Ways in which a file of a run is found broken: by a full disk, a failing one, an editor, another program."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], None]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def rubbish(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(max(64, path.stat().st_size)))


def zeroed(path: Path) -> None:
    """As a file system leaves a file whose size it had written and whose content it had not, when the power went."""
    path.write_bytes(bytes(path.stat().st_size))


def another_type(path: Path) -> None:
    """A list where an object belongs, an object where a list does, a text elsewhere."""
    if path.suffix == ".json":
        path.write_text('{"a": 1}' if isinstance(json.loads(path.read_text()), list) else "[1]")
    else:
        path.write_text("[1]\n[2]\n" if path.suffix == ".jsonl" else "hello\n")


def other_values(path: Path) -> None:
    """Every number, text and truth of a JSON file is an object that nobody expects there."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: changed(one) for name, one in value.items()}
        return [changed(one) for one in value] if isinstance(value, list) else {"un": "expected"}

    _each_json(path, changed)


def nothing_in_it(path: Path) -> None:
    _each_json(path, lambda value: type(value)())


def _each_json(path: Path, change: Callable[[Any], Any]) -> None:
    text = path.read_text()
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in text.splitlines()))
    else:
        path.write_text(json.dumps(change(json.loads(text))))


def gone(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "note.txt").write_text("not what you look for")


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


ANY: tuple[Spoil, ...] = (empty, cut, rubbish, zeroed, gone, a_folder, a_dangling_link)
JSON: tuple[Spoil, ...] = (*ANY, another_type, other_values, nothing_in_it)


def ways(name: str) -> tuple[Spoil, ...]:
    """Returns the ways to spoil a file of this name."""
    return JSON if name.endswith((".json", ".jsonl")) else ANY


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
