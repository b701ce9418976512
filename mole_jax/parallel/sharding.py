"""From the named axes of an array to its place on the mesh: one table."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mole_jax.errors import UserError
from mole_jax.parallel.mesh import batch_shards
from mole_jax.parameters import Parameter

BATCH = ("data", "fsdp")
"""Mesh axes that split the rows of a batch."""

FSDP_ORDER = ("embed", "mlp", "heads", "kv_heads")
"""`fsdp` cuts a parameter along the first of these axes that it has; all other axes stay whole."""

AXES = frozenset(FSDP_ORDER) | {"layers", "width", "vocab", "expert", "rank", "patch", "channel"}
"""Every axis name that a parameter may be declared with."""


def parameter_sharding(path: str, parameter: Parameter, mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns where a declared parameter lives.

    Raises:
        UserError: a mesh axis does not divide the axis of the parameter that it cuts.
    """
    axes: tuple[str, ...] = parameter.get_metadata("axes")
    assert set(axes) <= AXES, f"{path} has an axis that the table lacks: {axes}"
    chosen = next((axis for axis in FSDP_ORDER if axis in axes), None)
    parts = mesh.shape["fsdp"]
    for axis, size in zip(axes, parameter.shape, strict=True):
        if axis == chosen and size % parts:
            best = max(n for n in range(1, parts + 1) if size % n == 0)
            raise UserError(
                f"config: mesh.fsdp {parts} does not divide axis '{axis}' ({size}) of parameter {path}; "
                f"the nearest that does is {best}"
            )
    return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == chosen else None for axis in axes)))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_rows(x: jax.Array, axis: int = 0) -> jax.Array:
    """Pins an intermediate whose `axis` counts rows to the mesh in force (`jax.set_mesh`); does nothing without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * axis, BATCH))


def check_rows(rows: int, accumulation: int, mesh: jax.sharding.Mesh) -> None:
    """Raises `UserError` if a batch of `rows` cannot be cut into equal pieces for every device."""
    shards = batch_shards(mesh)
    if rows % (shards * accumulation):
        unit = shards * accumulation
        raise UserError(
            f"config: train.batch_rows {rows} does not divide over mesh.data x mesh.fsdp = {shards} devices times "
            f"train.accumulation {accumulation}; the nearest that does is {max(unit, round(rows / unit) * unit)}"
        )


def put_batch(arrays: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Puts the rows of this process's part of a batch onto its devices."""
    place = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(place, array) for name, array in arrays.items()}
