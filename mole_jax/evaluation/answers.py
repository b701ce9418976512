"""The answers to a task's questions while they come in, on disk, so that no question is asked twice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from etils import epath

from mole_jax.errors import UserError
from mole_jax.evaluation.pins import Pins, first_difference
from mole_jax.files import is_remote, write_text
from mole_jax.parallel import hosts


class Answers:
    """The answers so far, in the order of the questions; `add` returns when they are on disk.

    The file has the pins on its first line, and then one line an answer. A line that a kill cut short is asked again.
    All processes of a run read the file, the first one writes it. Object stores have no append, so there it is written
    whole each time.

    Attributes:
      texts: the answers.
    """

    def __init__(self, path: epath.Path, pins: Pins, *, strict: bool):
        """Opens the file, or begins it.

        Args:
          path: the file.
          pins: of the answers to come.
          strict: do not begin anew where the answers there have other pins.

        Raises:
          UserError: `strict`, and the answers there have other pins; or the file is not one of this kind.
        """
        self._path, self._remote = path, is_remote(path)
        header = json.dumps({"pins": pins})
        lines = _whole_lines(path)
        self.texts: list[str] = []
        if lines:
            before = _pins_of(lines[0], path)
            # As they read back: JSON has lists where Python may have tuples.
            differs = first_difference(before, json.loads(header)["pins"])
            if differs is None:
                self.texts = [json.loads(line)["prediction"] for line in lines[1:]]
            elif strict:
                raise UserError(
                    f"{path}: holds answers of an evaluation whose {differs} was {before.get(differs)!r}, it is now "
                    f"{pins.get(differs)!r}; put it back to go on with that one, or choose another --workdir"
                )
        self._lines = [header, *lines[1 : 1 + len(self.texts)]]
        if hosts.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write_whole()

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """Adds the answers to the questions `ids`, the next ones in order."""
        self.texts += texts
        if not hosts.is_first():
            return
        new = [json.dumps({"id": one, "prediction": text}) for one, text in zip(ids, texts, strict=True)]
        if self._remote:
            self._lines += new
            self._write_whole()
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in new)
            file.flush()
            os.fsync(file.fileno())

    def _write_whole(self) -> None:
        write_text(self._path, "".join(line + "\n" for line in self._lines))


def _whole_lines(path: epath.Path) -> list[str]:
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    return whole


def _pins_of(line: str, path: epath.Path) -> Pins:
    try:
        return json.loads(line)["pins"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not a file of answers of an evaluation; move it away") from None
