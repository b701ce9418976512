"""Versions, devices and memory of this process."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

import jax
from packaging.requirements import Requirement

from mole_jax.diagnosis.finding import Finding
from mole_jax.parallel.devices import GIB


def versions(requirements: list[str] | None = None) -> Iterator[Finding]:
    """Yields one row, or one for each package that is not what the project declares.

    `requirements`: in the form of pyproject.toml. None: those of the installed project.
    """
    declared = importlib.metadata.requires("mole-jax") if requirements is None else requirements
    wanted = [one for one in map(Requirement, declared or ()) if one.marker is None]
    bad = []
    for one in wanted:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        if version == "absent" or not one.specifier.contains(version, prereleases=True):
            bad.append(Finding(f"version of {one.name}", version, "off", f"pip install '{one.name}{one.specifier}'"))
    yield from bad or [Finding("versions", f"{len(wanted)} packages as declared, jax {jax.__version__}")]


def devices() -> Iterator[Finding]:
    """Yields the devices, their memory, and the processor."""
    local = jax.local_devices()
    count = f"{jax.device_count()} x {local[0].device_kind}"
    yield Finding("devices", f"{count}, {len(local)} here, {jax.process_count()} processes")
    limit = (local[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        yield Finding("memory of a device", f"{limit / GIB:.1f} GiB")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("host", f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB")
