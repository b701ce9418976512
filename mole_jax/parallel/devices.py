"""What is known of the chips we run on."""

from __future__ import annotations

from typing import Any

PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 FLOP/s by `jax.Device.device_kind`, from the vendors' data sheets."""


def peak_flops(device: Any) -> float | None:
    """Returns the chip's dense bfloat16 FLOP/s, or None where no figure is published (CPUs)."""
    return PEAK_FLOPS.get(device.device_kind)
