"""The device mesh. Only this folder names mesh axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from mole_jax.config import MeshConfig
from mole_jax.errors import UserError

AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns a mesh over the first ``data * fsdp`` devices; a `data` of -1 takes all that are left.

    Raises:
        UserError: the axes need more devices than there are, or do not divide them.
    """
    devices = jax.devices() if devices is None else devices
    if config.data == -1 and len(devices) % config.fsdp:
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        best = min(divisors, key=lambda n: abs(n - config.fsdp))
        raise UserError(
            f"config: mesh.fsdp {config.fsdp} does not divide the {len(devices)} devices there are; "
            f"set mesh.fsdp to {best}, or mesh.data to a number"
        )
    shape = (len(devices) // config.fsdp if config.data == -1 else config.data, config.fsdp)
    count = math.prod(shape)
    if count > len(devices):
        raise UserError(
            f"config: mesh.data {shape[0]} x mesh.fsdp {shape[1]} needs {count} devices, there are {len(devices)}; "
            f"lower one of them, or set mesh.data to -1 to take what is there"
        )
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"config: mesh.data {shape[0]} x mesh.fsdp {shape[1]} leaves {len(devices) - count} of {len(devices)} "
            "devices idle, which several hosts cannot do; set mesh.data to -1"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=list(devices)[:count]
    )


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Returns into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
