"""A piece of the model run on every device by itself (`jax.shard_map`), with its collectives written out.

Inside a region an array is this device's part. What crosses devices: each parameter's gathering over fsdp (its
gradient is summed and scattered back), one sum over tensor after each pair of matrices, experts or tokens
(`mole_jax.adapters.expert_sharding`), and the sums of gradients over the axes along which a parameter is whole.
Outside of regions, and on one device, all functions but `in_region` are the identity. What is no region, and left to
the partitioner, has `gather_layer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mole_jax.parallel.sharding import mesh_axes, partition

GATHERED = "gathered"
"""Name (`jax.ad_checkpoint.checkpoint_name`) of parameters made whole: the backward pass should gather them again."""

Specs = Any
"""Tree of `PartitionSpec` that may end earlier than the tree it belongs to."""


def in_region(
    body: Callable, parameters: Any, parameter_specs: Specs, arguments: tuple, specs: tuple, out_specs: Specs
) -> Any:
    """Returns ``body(parameters, *arguments)``, run in a region if a mesh of several devices is in force.

    `body` gets its device's part of everything; parameters are made whole along fsdp.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return body(parameters, *arguments)

    def local(parameters: Any, *arguments: Any) -> Any:
        return body(jax.tree.map(_gather, parameters, parameter_specs), *arguments)

    run = jax.shard_map(local, in_specs=(parameter_specs, *specs), out_specs=out_specs)
    return run(parameters, *arguments)


def gather_layer(x: jax.Array, *axes: str | None) -> jax.Array:
    """Makes a parameter with these named axes whole along fsdp, where no region does; the identity without a mesh.

    Left to choose, XLA:TPU turns a product with a split matrix into a loop that sends the parts round. On 16 devices
    these are so small that the vision tower takes four times as long.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    entries = (tuple(axis for axis in mesh_axes(entry) if axis != "fsdp") for entry in partition(*axes))
    spec = PartitionSpec(*(entry or None for entry in entries))
    return checkpoint_name(jax.lax.with_sharding_constraint(x, spec), GATHERED)


def on_each_device(body: Callable, specs: tuple, out_specs: Specs) -> Callable:
    """Returns `body` so that every device runs it on its part of the arguments. Parts must need nothing of others.

    For kernels (Pallas), which do not tell along which mesh axes their results vary. Inside of a region `body` is
    returned as it is: the arguments are parts already.
    """
    return body if _inside() else jax.shard_map(body, in_specs=specs, out_specs=out_specs, check_vma=False)


def enter_split(x: jax.Array) -> jax.Array:
    """Marks an array that all devices of the tensor axis hold as the input of matrices cut along their output.

    The gradients that come back from these matrices are then summed here, once, rather than at each of them.
    """
    return jax.lax.pcast(x, "tensor", to="varying") if _inside() else x


def leave_split(x: jax.Array) -> jax.Array:
    """Sums the partial products of matrices cut along their input."""
    return jax.lax.psum(x, "tensor") if _inside() else x


def expert_devices() -> int:
    """Returns over how many devices the experts are split here."""
    return jax.sharding.get_abstract_mesh().shape["expert"] if _inside() else 1


def gather_experts(x: jax.Array, axis: int) -> jax.Array:
    """Makes the experts' matrices whole along their `axis`; the gradient is summed and scattered back."""
    return checkpoint_name(jax.lax.all_gather(x, "expert", axis=axis, tiled=True), GATHERED)


def gather_rows(x: jax.Array) -> jax.Array:
    """Returns the rows of all devices that share the experts, one device's after the other's."""
    return jax.lax.all_gather(x, "expert", axis=0, tiled=True)


def scatter_rows(x: jax.Array) -> jax.Array:
    """Sums over the devices that share the experts and returns the own rows: what `gather_rows` is undone by."""
    return jax.lax.psum_scatter(x, "expert", scatter_dimension=0, tiled=True)


def own_experts(gates: jax.Array) -> jax.Array:
    """Returns the columns (last axis) of the experts that this device holds."""
    size = gates.shape[-1] // expert_devices()
    return jax.lax.dynamic_slice_in_dim(gates, jax.lax.axis_index("expert") * size, size, axis=-1)


def _inside() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    for dim, entry in enumerate(spec):
        if "fsdp" in mesh_axes(entry):
            x = checkpoint_name(jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True), GATHERED)
    return x
