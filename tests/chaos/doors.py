"""Commands as a user starts them, in this process or in one of their own, and what they answer."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from unittest import mock

from mole_jax.errors import UserError, print_error
from tests import tiny

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": tiny.CHILD_FLAGS, "PYTHONPATH": str(tiny.ROOT)}


@dataclasses.dataclass(frozen=True)
class Said:
    """What a command answered."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error; fails where there is another status, a traceback, or more than a line."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.err, self.err[-3000:]
        assert (self.status, len(lines)) == (2, 1), self
        return lines[0]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("warning: ")]

    def mentions(self, name: str) -> bool:
        return name in self.err


def here(door: str, *arguments: object) -> Said:
    """Runs ``python -m mole_jax.DOOR`` within this process; what is no `UserError` goes up: it would be a traceback."""
    module = importlib.import_module(f"mole_jax.{door}")
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [door, *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            module.main()
        except UserError as error:
            print_error(error)
            status = 2
        except SystemExit as end:
            status = int(end.code or 0)
    return Said(status, out.getvalue(), err.getvalue())


def command(door: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"mole_jax.{door}", *map(str, arguments)]


def apart(
    door: str,
    *arguments: object,
    wrap: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = 170,
) -> Said:
    """Runs ``python -m mole_jax.DOOR`` in a process of its own, behind the words of `wrap`."""
    done = subprocess.run(
        [*wrap, *command(door, *arguments)],
        env={**ENVIRONMENT, **(environment or {})},
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    return Said(done.returncode, done.stdout, done.stderr)
