"""Who takes part in a job: from flags, from the environment, or from the launcher that started this process."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from mole_jax import compat
from mole_jax.errors import UserError

LAUNCHERS = {
    "SLURM": ("SLURM_PROCID",),
    "Open MPI": ("OMPI_COMM_WORLD_RANK",),
    "Kubernetes": ("JOB_COMPLETION_INDEX",),
    "TPU": ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH"),
}
"""Variables by which a launcher that jax knows shows that it started this process."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """This process's place in a job of several."""

    coordinator: str
    """HOST:PORT of process 0."""
    processes: int
    process: int
    devices: tuple[int, ...] | None
    """Numbers of the host's GPUs that are this process's; None: all."""


FLAGS: tuple[tuple[str, str, Any, Any, str], ...] = (
    ("coordinator", "HOST:PORT", str, None, "address of process 0; TPU, SLURM, GKE and Open MPI need no flags"),
    ("processes", "N", int, None, "how many processes there are"),
    ("process", "I", int, None, "number of this process, from 0"),
    ("start-timeout", "SECONDS", float, 600, "wait so long until all are there"),
    ("host-timeout", "SECONDS", float, 60, "a process without a sign of life for so long is gone, and the others stop"),
)
"""Name, unit, type, default and meaning."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that every command for several hosts has; their defaults stand in the environment."""
    for name, unit, kind, default, meaning in FLAGS:
        variable = f"MOLE_JAX_{name.upper().replace('-', '_')}"
        text = f"several hosts: {meaning} ({variable}{'' if default is None else f', {default}'})"
        parser.add_argument(f"--{name}", metavar=unit, type=kind, default=os.environ.get(variable, default), help=text)


def find(flags: argparse.Namespace) -> Launch | None:
    """Returns this process's place, or None for a process by itself.

    Flags (`add_flags`) win; else a launcher is asked if there is one (`jax.distributed` knows how).

    Raises:
        UserError: some flags are given and others are not, they make no sense, or the launcher does not tell.
    """
    given = {"--coordinator": flags.coordinator, "--processes": flags.processes, "--process": flags.process}
    missing = [flag for flag, value in given.items() if value is None]
    for flag, seconds in (("--start-timeout", flags.start_timeout), ("--host-timeout", flags.host_timeout)):
        if not seconds > 0:
            raise UserError(f"{flag} is {seconds:g}, it must be over 0 seconds")
    if len(missing) == len(given):
        return _detected(flags.start_timeout)
    if missing:
        raise UserError(f"{' and '.join(missing)} not given; give --coordinator, --processes and --process, or none")
    if flags.processes < 1:
        raise UserError(f"--processes is {flags.processes}, it must be at least 1")
    if not 0 <= flags.process < flags.processes:
        raise UserError(
            f"--process is {flags.process}, with --processes {flags.processes} it is 0 to {flags.processes - 1}"
        )
    host, _, port = flags.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator expects HOST:PORT, got '{flags.coordinator}'; such as 10.0.0.1:1234")
    if flags.processes == 1:
        return None
    return Launch(flags.coordinator, flags.processes, flags.process, None)


def _detected(timeout: float) -> Launch | None:
    name = next((name for name, marks in LAUNCHERS.items() if any(mark in os.environ for mark in marks)), None)
    if compat.on_tpu_vm():
        name = "TPU"
    if name is None:
        return None
    try:
        coordinator, processes, process, devices = compat.detected_process(int(timeout))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name} started this process but does not tell its place ({reason}); "
            "give --coordinator, --processes and --process (alone: localhost:1234, 1 and 0)"
        ) from None
    if coordinator is None and name == "Kubernetes":
        raise UserError("Kubernetes started this process; to find the others, install the package kubernetes")
    if coordinator is None or processes is None or process is None or processes == 1:
        return None
    return Launch(coordinator, processes, process, None if devices is None else tuple(devices))
