"""The one exception that a user is meant to read, and how a command is run and called."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable

from mole_jax.terminal import escaped


class UserError(Exception):
    """A mistake outside this code: config, data, checkpoint or mesh.

    The message is one line that says what is wrong, where (file, record, field) and what to do.
    """


def nearest(name: str, candidates: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Returns ``", did you mean 'x'?"`` for the closest candidate, or an empty string."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return f", did you mean '{found[0]}'?" if found else ""


PROGRAM = "mole-jax"
"""The installed script (`mole_jax.command`)."""


def program(door: str) -> str:
    """Returns how a door was called, and so how to call it or another again."""
    return (
        f"{PROGRAM} {door}"
        if os.path.basename(sys.argv[0]).removesuffix(".exe") == PROGRAM
        else f"python -m mole_jax.{door}"
    )


def run_door(main: Callable[[], None]) -> None:
    """Runs a command's `main`; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print_error(error)
        # Not sys.exit: the interpreter would wait for threads, and a library's may wait for a full disk or a dead host.
        sys.stdout.flush()
        os._exit(2)


def print_error(error: UserError) -> None:
    """Prints `error` on stderr as one line, whatever it quotes from a file."""
    print(f"error: {escaped(str(error))}", file=sys.stderr, flush=True)
