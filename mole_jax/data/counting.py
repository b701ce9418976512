"""The rows that an epoch fills, counted by several processes: each packs whole shards, which know nothing of others."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool

from mole_jax.data.stream import end_with_parent
from mole_jax.errors import UserError

FEW = 20_000
"""Examples up to which they are counted in one process: others take some seconds to start."""

type Skipped = dict[tuple[int, int], tuple[str, str]]
"""As `mole_jax.data.stream.Ledger.entries`."""


@dataclasses.dataclass(frozen=True)
class Count:
    """What a shard, or several, make of their part of an epoch.

    Attributes:
      rows: of the shard that has most.
      skipped: records that were left out.
    """

    rows: int
    skipped: Skipped


def processes(shards: int, examples: int) -> int:
    """Returns how many processes count `examples` of so many shards: as many as cores, at most one for a shard."""
    return 1 if examples <= FEW else min(shards, _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def counted(count: Callable[[int], Count], shards: Iterable[int], processes: int) -> Count:
    """Returns the counts of all `shards` together, each by ``count(shard)`` in one of so many processes.

    Raises:
      UserError: what `count` raises, or a process was killed.
    """
    method = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, method, initializer=end_with_parent)
    try:
        found = list(pool.map(count, shards))
    except BrokenProcessPool:
        raise UserError(
            "a process that counts the epoch was killed, most often for want of memory; set train.steps, and nothing "
            "is counted"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    skipped = {key: entry for one in found for key, entry in one.skipped.items()}
    return Count(max(one.rows for one in found), skipped)
