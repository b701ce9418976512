"""Timing that is fair on a machine that drifts: candidates run in turn; and what the machine can do at most.

A ceiling is the best of a large matrix product, or of a large copy, in any of the libraries that are compared.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path

import jax

PAUSE = 0.02
"""Seconds between two calls: a library's idle threads spin a while before they sleep, and would slow the next one."""

Seconds = Mapping[str, list[float]]
"""By candidate, seconds of each counted call; calls of the same place were made one after the other."""


def alternately(candidates: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    """Calls each candidate once uncounted (it may compile), then one of each in turn, to and fro.

    Candidates wait for their device themselves.
    """
    for call in candidates.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name in list(candidates)[:: -1 if number % 2 else 1]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speedup(seconds: Seconds, ours: str, theirs: str) -> tuple[float, float, float]:
    """Returns how many times faster `ours` is than `theirs`: median, lower and upper quartile of the rounds' ratios."""
    ratios = sorted(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return middle, low, high


def least(seconds: Seconds, name: str) -> float:
    """Returns the shortest call of a candidate."""
    return min(seconds[name])


def machine(packages: Iterable[str]) -> dict[str, object]:
    """Describes the machine without naming it: processor, accelerator, cores, memory, load, versions."""
    device = jax.devices()[0]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 1),
        "system": platform.system(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }


def _processor() -> str:
    """Returns the processor's name: the platform module knows it on few systems."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
