"""What decides a score, written beside it: the weights, the questions, the prompt, the decoding and the metric."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from mole_jax.config import Config, TaskConfig
from mole_jax.config_json import identity
from mole_jax.data.held_out import Questions
from mole_jax.data.load import taken
from mole_jax.evaluation.metrics import METRIC_VERSIONS
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parallel.sharding import replicated
from mole_jax.parameters import Tree
from mole_jax.weights.foreign import of_pixels

Pins = dict[str, Any]
WEIGHTS = "weights"
"""The pin that says which model answered; all others say what it was asked, and how."""


def pins(config: Config, arch: LlavaArchitecture, task: TaskConfig, asked: Questions, weights: str) -> Pins:
    """Returns everything that decides a task's score, as plain JSON values.

    Args:
        config: as the checkpoint is evaluated: prompt and image preparation are the checkpoint's own.
        arch: the checkpoint's.
        task, asked: the task and its questions.
        weights: as `fingerprint` names them.
    """
    return {
        WEIGHTS: weights,
        "frozen_dtype": config.model.frozen_dtype,
        "compute_dtype": config.model.compute_dtype,
        "prompt": config.data.prompt,
        "suffix": task.suffix,
        "image_aspect": config.data.image_aspect,
        "image_size": arch.vision.image_size,
        "feature_layer": arch.feature_layer,
        "feature_select": arch.feature_select,
        "decoding": dataclasses.asdict(task.decoding) | {"stop": list(task.decoding.stop)},
        "questions": asked.sha256,
        "metric": task.metric,
        "metric_version": METRIC_VERSIONS[task.metric],
        **of_pixels(taken(config.data, arch.image)),
    }


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any], *, but: str = "") -> str | None:
    """Returns the name of a pin that differs between `a` and `b`, other than `but`."""
    return next((name for name in {**a, **b} if name != but and a.get(name) != b.get(name)), None)


def fingerprint(config: Config, arch: LlavaArchitecture, mesh: jax.sharding.Mesh, *trees: Tree) -> str:
    """Returns a hash of a model by its content: architecture, adapter settings and the bits of every array.

    Any cut of the arrays over devices, and over `trees`, gives the same. The bits are hashed where they are (64 per
    array, not proof against forgery), so that a large model need not be gathered on a host.
    """
    leaves = dict(
        sorted(
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for tree in trees
            for path, leaf in jax.tree.leaves_with_path(tree)
        )
    )
    digest = hashlib.sha256(f"{identity(arch)} {identity(config.adapter)}".encode())
    sums_of = jax.jit(_sums, out_shardings=replicated(mesh))
    for (path, leaf), sums in zip(leaves.items(), jax.device_get(sums_of(list(leaves.values()))), strict=True):
        digest.update(f"{path} {leaf.dtype} {leaf.shape} {sums.tolist()}".encode())
    return digest.hexdigest()


def _sums(arrays: list[Array]) -> list[UInt32[Array, " 2"]]:
    return [_two_sums(array) for array in arrays]


def _two_sums(array: Array) -> UInt32[Array, " 2"]:
    """Sums two mixes of value and place over all places, modulo 2**32: exact, whatever the order of the sum."""
    width = jnp.iinfo(f"uint{8 * array.dtype.itemsize}").dtype
    bits = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
    place, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    first = _mixed(bits ^ _mixed(place + jnp.uint32(0x9E3779B9)))
    return jnp.stack([one.sum(dtype=jnp.uint32) for one in (first, _mixed(first + jnp.uint32(0x85EBCA6B)))])


def _mixed(x: UInt32[Array, "*axes"]) -> UInt32[Array, "*axes"]:
    """The finaliser of MurmurHash3: every bit of `x` reaches every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
