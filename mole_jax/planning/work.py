"""What a step does, read off what JAX traced of it and nothing compiled: products, and what each layer keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args

import jax

from mole_jax import compat
from mole_jax.config import Config, MeshConfig, Remat
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parallel.mesh import make_mesh
from mole_jax.planning.compile import abstract_step, with_layers
from mole_jax.training.setup import compiled_step

DEPTHS = (2, 3)
"""Layers of the traced steps, from which the whole depth follows. No other loop of the model has as few trips."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Of a training step, for each token of its rows."""

    flops: float
    """Of all matrix products and kernels, with what is computed again."""
    kept: float
    """Bytes that the decoder's layers keep for the backward pass, not split over tensor."""

    def kept_on(self, arch: LlavaArchitecture, tensor: int) -> float:
        """Returns what one of `tensor` devices keeps: every layer's input whole, of the rest its share."""
        inputs = min(self.kept, 2.0 * arch.decoder.width * arch.decoder.layers)
        return inputs + (self.kept - inputs) / tensor


def work_of(config: Config, arch: LlavaArchitecture, device: Any) -> dict[str, Work]:
    """Returns what each policy of `model.remat` makes of a step, those that keep most first.

    One row on one device is traced, which takes seconds.
    """
    train = dataclasses.replace(config.train, batch_rows=1, accumulation=1)
    alone = dataclasses.replace(config, train=train, mesh=MeshConfig(data=1))
    mesh = make_mesh(alone.mesh, [device])

    def traced(remat: Remat, layers: int) -> tuple[int, int]:
        model = dataclasses.replace(config.model, remat=remat)
        step = abstract_step(dataclasses.replace(alone, model=model), with_layers(arch, layers), mesh)
        with jax.set_mesh(mesh), compat.for_absent_devices():
            run = compiled_step(step.train_step, step.state, mesh)
            jaxpr = run.trace(step.state, step.frozen, step.batch).jaxpr.jaxpr
        return products(jaxpr), stacked(jaxpr, layers)

    def at_depth(low: int, high: int) -> float:
        return (low + (high - low) * (arch.decoder.layers - DEPTHS[0])) / config.data.sequence_length

    found: dict[str, Work] = {}
    for remat in get_args(Remat):
        two, three = (traced(remat, layers) for layers in DEPTHS)
        found[remat] = Work(at_depth(two[0], three[0]), at_depth(two[1], three[1]))
    return dict(sorted(found.items(), key=lambda item: -item[1].kept))


def inside(equation: Any) -> Iterator[Any]:
    """Yields the jaxprs that an equation holds."""
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def products(jaxpr: Any) -> int:
    """Counts two FLOPs for each multiplication of a matrix product, as often as loops and devices do it.

    A kernel counts with what it declares; of a condition's branches the dearest does.
    """
    total = 0
    for one in jaxpr.eqns:
        if one.primitive.name == "dot_general":
            ((contracted, _), _), (left, *_) = one.params["dimension_numbers"], one.invars
            total += 2 * math.prod(one.outvars[0].aval.shape) * math.prod(left.aval.shape[i] for i in contracted)
        each = [products(inner) for inner in inside(one)]
        if (declared := one.params.get("cost_estimate")) is not None:
            total += declared.flops
        elif one.primitive.name == "cond":
            total += max(each)
        elif one.primitive.name == "scan":
            total += sum(each) * one.params["length"]
        else:
            total += sum(each) * (one.params["mesh"].size if one.primitive.name == "shard_map" else 1)
    return total


def stacked(jaxpr: Any, trips: int) -> int:
    """Returns the bytes that forward loops of so many trips stack up, one slice a trip."""
    total = 0
    for one in jaxpr.eqns:
        if one.primitive.name == "scan" and one.params["length"] == trips:
            if one.params["reverse"]:  # the backward pass stacks the weights' gradients
                continue
            (body,) = inside(one)
            pairs = zip((v.aval for v in one.outvars), (v.aval for v in body.outvars), strict=True)
            total += sum(whole.size * whole.dtype.itemsize for whole, piece in pairs if whole.ndim > piece.ndim)
        else:
            total += sum(stacked(inner, trips) for inner in inside(one))
    return total
