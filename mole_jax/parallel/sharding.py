"""From the named axes of an array to its place on the mesh: one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mole_jax.errors import UserError
from mole_jax.parallel.mesh import BATCH, batch_shards, nearest_divisor
from mole_jax.parameters import Parameter

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": BATCH,
    "sequence": (),
    "embed": ("fsdp",),
    "mlp": ("tensor", "fsdp"),
    "heads": ("tensor", "fsdp"),
    "kv_heads": ("tensor", "fsdp"),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "rank": (),
    "layers": (),
    "width": (),
    "patch": (),
    "channel": (),
}
"""Mesh axes that cut each named axis.

A mesh axis cuts an array once: `embed` has the first claim on fsdp, then the axes from left to right. Of two matrices
one after the other, the first is so cut over tensor along its output (gate, up, q, k, v), the second along its input
(down, o), and both have the one sum over tensor at the end (Megatron-LM, arXiv 1909.08053). The low-rank pair beside
them is cut like the matrix: A whole and B cut, or A cut and B whole, since `rank` is never cut. `expert` is the axis
of the experts' stacked ranks.
"""


def partition(*axes: str | None) -> PartitionSpec:
    """Returns how an array with these named axes is cut; None is an axis that never is."""
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = [None] * len(axes)
    for i in sorted(range(len(axes)), key=lambda i: axes[i] != "embed"):
        entry = tuple(mesh_axis for mesh_axis in RULES[axes[i] or "width"] if mesh_axis not in used)
        used.update(entry)
        entries[i] = entry or None
    return PartitionSpec(*entries)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns one entry of a `PartitionSpec` as a tuple."""
    return (entry,) if isinstance(entry, str) else entry or ()


def parameter_sharding(path: str, parameter: Parameter, mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns where a declared parameter lives.

    Raises:
        UserError: a mesh axis does not divide the axis of the parameter that it cuts.
    """
    axes: tuple[str, ...] = parameter.get_metadata("axes")
    spec = partition(*axes)
    for axis, size, entry in zip(axes, parameter.shape, spec, strict=True):
        left = size
        for mesh_axis in mesh_axes(entry):
            parts = mesh.shape[mesh_axis]
            if left % parts:
                raise UserError(
                    f"config: mesh.{mesh_axis} {parts} does not divide axis '{axis}' ({left}) of parameter {path}; "
                    f"the nearest that does is {nearest_divisor(left, parts)}"
                )
            left //= parts
    return NamedSharding(mesh, spec)


def check_whole(mesh: jax.sharding.Mesh, mesh_axis: str, counts: Mapping[str, int]) -> None:
    """Checks that `mesh_axis` does not cut through a thing that must stay whole (a head, an expert).

    Raises:
        UserError: the mesh axis does not divide one of `counts`.
    """
    parts = mesh.shape[mesh_axis]
    for what, count in counts.items():
        if count % parts:
            raise UserError(
                f"config: mesh.{mesh_axis} {parts} does not divide the {count} {what}; "
                f"the nearest that does is {nearest_divisor(count, parts)}"
            )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, partition("batch"))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an intermediate to the mesh in force (`jax.set_mesh`) by its named axes; does nothing without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(*axes))


def check_rows(rows: int, accumulation: int, mesh: jax.sharding.Mesh) -> None:
    """Raises `UserError` if a batch of `rows` cannot be cut into equal pieces for every device."""
    shards = batch_shards(mesh)
    if rows % (shards * accumulation):
        unit = shards * accumulation
        axes = " x ".join(f"mesh.{axis}" for axis in BATCH)
        raise UserError(
            f"config: train.batch_rows {rows} does not divide over {axes} = {shards} devices times "
            f"train.accumulation {accumulation}; the nearest that does is {max(unit, round(rows / unit) * unit)}"
        )


def reader(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Returns (index, count): this process reads the `index`-th of `count` equal parts of each batch's rows.

    Processes that hold the same rows (the tensor axis reaches over them) have the same index.

    Raises:
        UserError: two processes share some of their rows, but not all.
    """
    shards = np.arange(batch_shards(mesh)).reshape([mesh.shape[axis] for axis in BATCH])
    held: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(int(shards[place[: len(BATCH)]]))
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != shards.size or len({len(part) for part in parts}) != 1:
        raise UserError(
            "config: mesh.tensor spreads rows unevenly over the hosts; make it divide, or a multiple of, "
            "the number of devices of a host"
        )
    mine = tuple(sorted(held.get(jax.process_index(), parts[0])))
    return parts.index(mine), len(parts)


def put_batch(arrays: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Puts the rows that this process reads (`reader`) onto its devices."""
    place, (_, readers) = batch_sharding(mesh), reader(mesh)

    def put(array: np.ndarray) -> jax.Array:
        shape = (array.shape[0] * readers, *array.shape[1:])
        indices: Any = place.addressable_devices_indices_map(shape).values()
        starts = sorted({rows[0].start or 0 for rows in indices})
        size = array.shape[0] // len(starts)

        def piece(index: Any) -> np.ndarray:
            i = starts.index(index[0].start or 0)
            return array[i * size : (i + 1) * size]

        return jax.make_array_from_callback(shape, place, piece)

    return {name: put(array) for name, array in arrays.items()}
