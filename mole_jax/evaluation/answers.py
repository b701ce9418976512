"""The answers to a task's questions while they come in, on disk, so that no question is asked twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mole_jax.errors import UserError
from mole_jax.evaluation.pins import Pins, first_difference
from mole_jax.files import explained, is_remote, json_text, made, read_json_lines, write_json_lines
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
        before = read_json_lines(path, ({"pins": dict}, {"prediction": str})) if path.exists() else []
        head, *answers = before or [{"pins": pins}]
        if "pins" not in head or not all("prediction" in one for one in answers):
            raise UserError(f"{path}: is not a file of answers of an evaluation; move it away")
        # As they read back: JSON has lists where Python may have tuples.
        differs = first_difference(head["pins"], json.loads(json_text(pins)))
        if differs is not None and strict:
            raise UserError(
                f"{path}: holds answers of an evaluation whose {differs} was {head['pins'].get(differs)!r}, it is now "
                f"{pins.get(differs)!r}; put it back to go on with that one, or choose another --workdir"
            )
        self._path, self._remote = path, is_remote(path)
        self._lines: list[Mapping[str, Any]] = [{"pins": pins}, *(answers if differs is None else ())]
        self.texts: list[str] = [one["prediction"] for one in self._lines[1:]]
        if hosts.is_first():
            made(path.parent)
            write_json_lines(path, self._lines)

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """Adds the answers to the questions `ids`, the next ones in order.

        Raises:
          UserError: they cannot be written.
        """
        self.texts += texts
        if not hosts.is_first():
            return
        new = [{"id": one, "prediction": text} for one, text in zip(ids, texts, strict=True)]
        if self._remote:
            self._lines += new
            write_json_lines(self._path, self._lines)
            return
        with explained(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.writelines(json_text(line) + "\n" for line in new)
            file.flush()
            os.fsync(file.fileno())
