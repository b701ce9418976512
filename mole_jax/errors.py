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
    """Runs a command's `main`; a `UserError` becomes one line on stderr and exit status 2, and so does a device whose
    memory is too small; Ctrl-C ends it with 130."""
    try:
        main()
    except UserError as error:
        print_error(error)
        _exit(2)
    except KeyboardInterrupt:
        _exit(130)
    except RuntimeError as error:
        if not str(error).startswith(_NO_MEMORY):  # jax's own class would have to be imported to be named
            raise
        print_error(UserError(f"{str(error).removeprefix(_NO_MEMORY).split(chr(10))[0].strip()} {_LESS_MEMORY}"))
        _exit(2)


_NO_MEMORY = "RESOURCE_EXHAUSTED:"
_LESS_MEMORY = (
    "The device has too little memory: cut the batch into more pieces (train.accumulation), keep less for the backward "
    "pass (model.remat full), spread the model (mesh.fsdp), or answer fewer questions at once (evaluation.batch_size, "
    "--batch-size); `plan` tells what fits"
)


def _exit(status: int) -> None:
    # Not sys.exit: the interpreter would wait for threads, and a library's may wait for a full disk or a dead host.
    sys.stdout.flush()
    os._exit(status)


def print_error(error: UserError) -> None:
    """Prints `error` on stderr as one line, whatever it quotes from a file."""
    print(f"error: {escaped(str(error))}", file=sys.stderr, flush=True)
