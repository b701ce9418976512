"""How a parameter is declared: once, with its shape, its axes, its group and its first value.

From the declaration follow the abstract tree, the shardings (`mole_jax.parallel.sharding`), the
partition into trainable and frozen, the learning-rate group and weight decay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mole_jax.config import Group

Tree = dict[str, Any]
"""Nested dict of arrays (or of anything that belongs to an array), keyed by attribute names."""


class Parameter(nnx.Param):
    """An array with named axes. Each subclass is a group of parameters."""

    group: ClassVar[Group]


class AdapterParam(Parameter):
    """LoRA and expert matrices."""

    group: ClassVar[Group] = "adapters"


class RouterParam(Parameter):
    """Routers of the expert mixtures."""

    group: ClassVar[Group] = "router"


class ProjectorParam(Parameter):
    """Projector and image start/end vectors."""

    group: ClassVar[Group] = "projector"


class VisionParam(Parameter):
    """The vision tower."""

    group: ClassVar[Group] = "vision"


class DecoderParam(Parameter):
    """The language model without its adapters."""

    group: ClassVar[Group] = "decoder"


Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def constant(value: float) -> Initializer:
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def normal(std: float) -> Initializer:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Kaiming-uniform with a = sqrt(5), torch's default for linear layers; fan-in is ``shape[-2]``."""
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


@dataclasses.dataclass(frozen=True)
class Declare:
    """Declares the parameters of one module.

    `stack` is the leading shape shared by all of them, with axis names `stack_axes`: stacked layers are
    declared in one array and a module inside `jax.lax.scan` sees its own slice.
    """

    kind: type[Parameter]
    rngs: nnx.Rngs
    stack: tuple[int, ...] = ()
    stack_axes: tuple[str, ...] = ()

    def __call__(
        self, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer, *, decay: bool = False
    ) -> Parameter:
        """Returns a float32 parameter of shape ``stack + shape``; `decay`: weight decay applies to it."""
        assert len(shape) == len(axes)
        # Adapters draw from a stream of their own, so that the base does not depend on whether there are any.
        stream = self.rngs.adapters if self.kind in (AdapterParam, RouterParam) else self.rngs.params
        value = init(stream(), self.stack + shape)
        return self.kind(value, axes=self.stack_axes + axes, decay=decay)

    def layers(self, count: int) -> Declare:
        return dataclasses.replace(self, stack=(count, *self.stack), stack_axes=("layers", *self.stack_axes))

    def of(self, kind: type[Parameter]) -> Declare:
        return dataclasses.replace(self, kind=kind)


def streams(seed: int | jax.Array) -> nnx.Rngs:
    """Returns the random streams that `Declare` draws from."""
    key = jax.random.key(seed)
    return nnx.Rngs(params=key, adapters=jax.random.fold_in(key, 1))


def group_of(parameter: Parameter) -> Group:
    """Returns the group of a declared parameter."""
    return parameter.group


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns ``{"a/b/c": leaf}`` in sorted order."""
    return {
        "/".join(str(entry.key) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))[0]
    }


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """Inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def declared(model: nnx.Module) -> dict[str, Parameter]:
    """Returns every parameter of `model` by path, in sorted order."""
    return {"/".join(map(str, path)): variable for path, variable in sorted(nnx.to_flat_state(nnx.state(model)))}


def split_trainable(
    leaves: Mapping[str, Any], declarations: Mapping[str, Parameter], groups: Iterable[str]
) -> tuple[Tree, Tree]:
    """Splits `leaves` (by path) into those of the trainable `groups` and the frozen rest."""
    chosen = set(groups)
    trainable = {path: leaf for path, leaf in leaves.items() if group_of(declarations[path]) in chosen}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trainable}
    return unflatten(trainable), unflatten(frozen)
