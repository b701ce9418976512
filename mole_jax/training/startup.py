"""Where the time until the first step goes."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

import jax

STARTS_FILE = "starts.jsonl"
"""Of a run's folder: for each start when, on what and by which versions, its first step, the seconds of every part,
programs compiled and found."""


def machine() -> dict[str, Any]:
    """Returns the date (UTC), the devices of all processes, and versions."""
    kind, count, processes = jax.devices()[0].device_kind, jax.device_count(), jax.process_count()
    hosts = f" of {processes} processes" if processes > 1 else ""
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{count} x {kind}{hosts}",
        "versions": {name: importlib.metadata.version(name) for name in ("mole-jax", "jax")},
    }


class Startup:
    """A stopwatch that runs since the process began."""

    def __init__(self):
        self.parts: dict[str, float] = {}
        self.last = time.perf_counter()
        self.parts["imports"] = age()

    def lap(self, part: str) -> None:
        """Ends a part that began where the one before ended."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"first step after {sum(self.parts.values()):.1f} s: {parts}"


def age() -> float:
    """Returns for how many seconds this process has run; 0 where the system does not tell."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError):
        return 0.0
