"""The device mesh. Only this folder names mesh axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from mole_jax.config import MeshConfig
from mole_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
"""From the axis that talks least to the one that talks most: neighbouring devices share the last."""

BATCH = ("data", "fsdp", "expert")
"""Mesh axes that split the rows of a batch."""

AUTO = (jax.sharding.AxisType.Auto,) * len(AXES)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns a mesh over the first ``data * fsdp * expert * tensor`` devices; a `data` of -1 takes all that are left.

    With `slices` > 1 the devices of a slice stay together: only `data` reaches over the slow network between slices.

    Raises:
        UserError: the axes need more devices than there are, do not divide them, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    inner = {axis: getattr(config, axis) for axis in AXES[1:]}
    shape = (_left_for_data(inner, len(devices)) if config.data == -1 else config.data, *inner.values())
    count = math.prod(shape)
    asked = " x ".join(f"mesh.{a} {n}" for a, n in zip(AXES, shape, strict=True) if n > 1 or a == "data")
    if count > len(devices):
        raise UserError(
            f"config: {asked} needs {count} devices, there are {len(devices)}; "
            f"lower one of them, or set mesh.data to -1 to take what is there"
        )
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"config: {asked} leaves {len(devices) - count} of {len(devices)} devices idle, "
            "which several hosts cannot do; set mesh.data to -1"
        )
    if config.slices > 1:
        return _over_slices(config.slices, shape, devices)
    try:
        return jax.make_mesh(shape, AXES, axis_types=AUTO, devices=devices[:count])
    except NotImplementedError:
        # An axis that fills no whole side of the torus, such as 8 on 4 x 4 chips.
        split = mesh_utils.create_device_mesh(shape, devices[:count], allow_split_physical_axes=True)
        return jax.sharding.Mesh(split, AXES, axis_types=AUTO)


def _over_slices(slices: int, shape: tuple[int, ...], devices: Sequence[Any]) -> jax.sharding.Mesh:
    if shape[0] % slices:
        raise UserError(
            f"config: mesh.slices {slices} does not divide mesh.data {shape[0]}, the only axis that reaches "
            f"over slices; the nearest that does is {nearest_divisor(shape[0], slices)}"
        )
    # TPUs and recent GPU clients number the slices (on GPUs: the hosts joined by NVLink); elsewhere a host is a slice.
    numbered = len({getattr(device, "slice_index", 0) for device in devices}) > 1
    found = len({device.slice_index if numbered else device.process_index for device in devices})
    if found != slices:
        raise UserError(f"config: mesh.slices is {slices}, the devices form {found}; set mesh.slices to {found}")
    grid: np.ndarray = mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]),
        (slices, 1, 1, 1),
        devices,
        process_is_granule=not numbered,
        allow_split_physical_axes=True,
    )
    return jax.sharding.Mesh(grid, AXES, axis_types=AUTO)


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the largest divisor of `number` up to `wanted`."""
    return max(n for n in range(1, min(number, wanted) + 1) if number % n == 0)


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def _left_for_data(inner: dict[str, int], devices: int) -> int:
    left = devices
    for axis, size in reversed(inner.items()):
        if left % size:
            of = f"the {devices} devices there are" if left == devices else f"the {left} devices that the others leave"
            raise UserError(
                f"config: mesh.{axis} {size} does not divide {of}; "
                f"set mesh.{axis} to {nearest_divisor(left, size)}, or mesh.data to a number"
            )
        left //= size
    return left
