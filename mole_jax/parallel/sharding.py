"""From the named axes of an array to its place on the mesh: one table."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mole_jax.errors import UserError
from mole_jax.parallel.mesh import batch_shards
from mole_jax.parameters import Parameter

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # Every data and fsdp device has rows of its own.
    "batch": ("data", "fsdp"),
    # Each matrix has exactly one axis of this kind, so each is cut once.
    "embed": "fsdp",
    # Not cut.
    "sequence": None,
    "layers": None,
    "width": None,
    "mlp": None,
    "heads": None,
    "kv_heads": None,
    "vocab": None,
    "expert": None,
    "rank": None,
    "patch": None,
    "channel": None,
}


def spec(*axes: str | None) -> PartitionSpec:
    """Returns the partition of an array with these named axes; None is an axis that is never cut."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def parameter_sharding(path: str, parameter: Parameter, mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns where a declared parameter lives.

    Raises:
        UserError: a mesh axis does not divide the axis of the parameter that it cuts.
    """
    axes: tuple[str, ...] = parameter.get_metadata("axes")
    for axis, size in zip(axes, parameter.shape, strict=True):
        mesh_axis = RULES[axis]
        if isinstance(mesh_axis, str) and size % mesh.shape[mesh_axis]:
            best = max(n for n in range(1, mesh.shape[mesh_axis] + 1) if size % n == 0)
            raise UserError(
                f"config: mesh.{mesh_axis} {mesh.shape[mesh_axis]} does not divide axis '{axis}' ({size}) of parameter "
                f"{path}; the nearest that does is {best}"
            )
    return NamedSharding(mesh, spec(*axes))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an intermediate to its place on the mesh in force (`jax.set_mesh`); does nothing without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


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
