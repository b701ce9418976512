"""Which part of a study this process runs: as it is told, or by the slice of a TPU pod that it is on."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from mole_jax.errors import UserError

SLICE, SLICES = "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES"
"""What TPU pods of several slices set on every host."""


def part_of(flag: str | None, environment: MutableMapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns which part this process runs and how many there are.

    Without a `flag` (I/N) it is the pod's slice, and the pod's variables go from `environment`: each slice is then a
    job of its own and must not wait for the others. Call it before JAX looks for devices.

    Raises:
        UserError: the flag is not two numbers, the first below the second.
    """
    if flag is None:
        found = int(environment.get(SLICE, 0)), int(environment.get(SLICES, 1))
        for name in [name for name in environment if name.startswith("MEGASCALE_")]:
            del environment[name]
        return found
    first, slash, last = flag.partition("/")
    if not (slash and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"--part {flag}: give two numbers I/N with I under N, such as 0/4")
    return int(first), int(last)
