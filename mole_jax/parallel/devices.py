"""What is known of the chips we run on."""

from __future__ import annotations

import dataclasses
import resource
import sys
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; None where no figure is published or none applies."""

    flops: float
    """Dense bfloat16 FLOP/s (data sheet)."""
    memory: float | None = None
    """Bytes of device memory that a program may use. TPU: what XLA:TPU says when a program does not fit, a little
    under the data sheet's; GPU: the data sheet's."""
    bandwidth: float | None = None
    """Bytes/s of device memory (data sheet)."""
    links: float | None = None
    """Bytes/s that all links to other chips can send together; half of what data sheets call bidirectional."""
    clock: float | None = None
    """Cycles/s in which XLA:TPU estimates. v5e: published ("How to Scale Your Model", part 2). v5p: the data sheet's
    FLOP/s over those of a cycle, 2 in each cell of 2 cores x 4 matrix units of 128 x 128. v6e: not published; FLOP/s
    over 2 x 4 x 256 x 256, the least such number that the compiler's own estimate of a large product (369,000 FLOPs a
    cycle) fits under."""
    slices: float | None = None
    """Bytes/s that a chip has to other slices: the network of a pod over its chips (Google Cloud's pages; v5p: "How to
    Scale Your Model", part 2)."""


CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 819e9, 200e9, 1.5e9, 3.125e9),
    "TPU v5p": Chip(459e12, 95.73 * GIB, 2765e9, 600e9, 1.75e9, 6.25e9),
    "TPU v5": Chip(459e12, 95.73 * GIB, 2765e9, 600e9, 1.75e9, 6.25e9),
    "TPU v6 lite": Chip(918e12, 31.24 * GIB, 1638e9, 400e9, 1.75e9, 12.5e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "NVIDIA L4": Chip(121e12, 24e9, 300e9, 32e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
}
"""By `jax.Device.device_kind`; figures of Google Cloud's TPU pages and NVIDIA's data sheets."""


def chip_of(device: Any) -> Chip | None:
    """Returns what is known of the chip, None for one that is not in the table (CPUs)."""
    return CHIPS.get(device.device_kind)


def peak_flops(device: Any) -> float | None:
    """Returns the chip's dense bfloat16 FLOP/s, or None where no figure is published (CPUs)."""
    chip = chip_of(device)
    return None if chip is None else chip.flops


def kind_in_force() -> str:
    """Returns the first word of the `device_kind` that is computed or compiled for, such as ``TPU`` or ``cpu``.

    Empty where a mesh does not say it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device if not mesh.empty else jax.devices()[0]
    return device.device_kind.split()[0] if device is not None else ""


def on_hopper() -> bool:
    """Returns whether the GPUs of this process are H100s, H200s or others of NVIDIA's compute capability 9.0.

    False for devices that are only compiled for.
    """
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


def peak_memory(device: Any) -> float:
    """Returns the most bytes that were held at a time so far: on the device, or by this process where it is a CPU."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
