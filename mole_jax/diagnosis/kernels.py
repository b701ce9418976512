"""Attention kernels and expert paths on this device, values and gradients, against the plainest form of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mole_jax.adapters.build import Adapters
from mole_jax.config import AdapterConfig, AttentionKernel, MeshConfig
from mole_jax.diagnosis.finding import Finding
from mole_jax.errors import UserError
from mole_jax.model.architecture import DecoderArchitecture
from mole_jax.model.attention import attention, check
from mole_jax.model.decoder import Decoder
from mole_jax.parallel.devices import kind_in_force, on_hopper
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import batch_sharding, parameter_sharding, replicated
from mole_jax.parameters import Declare, DecoderParam, declared, streams, unflatten

ATTENTION_ERROR = 2e-2
"""Largest distance in bfloat16, over the norm of what is expected. One rounding is up to 4e-3."""
EXPERT_ERROR = 1e-3
"""The same in float32."""


def attention_paths() -> Iterator[Finding]:
    """Yields a row for each kernel that is for this device."""
    expected = _attended("xla", jnp.float32)
    for kernel in get_args(AttentionKernel):
        if kernel in ("auto", "xla") or (kernel == "mosaic" and not on_hopper()):
            continue
        try:
            check(kernel, kind_in_force())
        except UserError:
            continue
        yield _compared(
            f"attention {kernel}",
            functools.partial(_attended, kernel, jnp.bfloat16),
            expected,
            ATTENTION_ERROR,
            "do not train with it: set model.attention xla, and report the device and the versions of jax and tokamax",
        )


def _attended(kernel: AttentionKernel, dtype: Any) -> list[np.ndarray]:
    """Returns the result and the gradients of queries, keys and values: two rows, three segments, grouped heads."""
    generator = np.random.default_rng(0)
    shapes = (2, 4, 256, 64), (2, 2, 256, 64), (2, 2, 256, 64)
    q, k, v = (jnp.asarray(generator.standard_normal(shape), jnp.bfloat16).astype(dtype) for shape in shapes)
    segments = jnp.asarray(np.tile(np.repeat([1, 2, 3], [100, 100, 56]), (2, 1)))
    probe = jnp.asarray(generator.standard_normal((2, 256, 4 * 64)), jnp.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(q, k, v):
        y = attention(q, k, v, causal=True, segment_ids=segments, kernel=kernel).astype(jnp.float32)
        return (y * probe).sum(), y

    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        (_, y), gradients = run(q, k, v)
    return [np.asarray(one, np.float32) for one in (y, *gradients)]


def expert_paths() -> Iterator[Finding]:
    """Yields a row for each way to compute experts here; those over devices need an even number of them."""
    one = MeshConfig(data=1)
    expected = _routed(AdapterConfig(expert_path="masked"), one)
    ways = {"grouped": (AdapterConfig(expert_path="grouped"), one)}
    if jax.device_count() % 2 == 0:
        split = MeshConfig(data=-1, expert=2)
        for movement in ("gather", "all_to_all"):
            ways[f"over devices, {movement}"] = AdapterConfig(expert_path="masked", expert_sharding=movement), split
    for name, (config, mesh) in ways.items():
        yield _compared(
            f"experts {name}",
            functools.partial(_routed, config, mesh),
            expected,
            EXPERT_ERROR,
            "do not train with it: set adapter.expert_path masked and mesh.expert 1, and report device and versions",
        )


def _routed(config: AdapterConfig, mesh_config: MeshConfig) -> list[np.ndarray]:
    """Returns the result and all gradients of a small decoder whose MLPs have four experts."""
    one = mesh_config.data == 1
    mesh = make_mesh(mesh_config, jax.local_devices()[:1] if one else None)
    arch = DecoderArchitecture(
        vocab=8, width=16, mlp_width=24, layers=2, heads=4, kv_heads=2, head_dim=4, max_position=8
    )
    adapters = Adapters(
        AdapterConfig(
            experts=4, rank=4, dropout=0.0, expert_path=config.expert_path, expert_sharding=config.expert_sharding
        )
    )
    model = nnx.eval_shape(lambda: Decoder(Declare(DecoderParam, streams(0)), arch, adapters))
    graph, declarations = nnx.graphdef(model), declared(model)
    generator = np.random.default_rng(0)
    weights = {path: 0.2 * generator.standard_normal(leaf.shape) for path, leaf in sorted(declarations.items())}
    rows = jax.device_count()
    x, probe = (generator.standard_normal((rows, 8, arch.width)) for _ in range(2))

    def run(leaves, x, probe):
        decoder = nnx.merge(graph, unflatten(leaves))
        positions = jnp.broadcast_to(jnp.arange(8), (rows, 8))
        segments = jnp.ones((rows, 8), jnp.int32)
        y, _ = decoder(x, positions, segments, segments=1, key=jax.random.key(0), remat="full")
        return (y * probe).sum(), y

    leaves = {path: _put(value, parameter_sharding(path, declarations[path], mesh)) for path, value in weights.items()}
    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True), out_shardings=replicated(mesh))
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        (_, y), gradients = step(leaves, _put(x, batch_sharding(mesh)), _put(probe, batch_sharding(mesh)))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((y, gradients))]


def _put(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part].astype(np.float32))


def _compared(
    name: str, run: Callable[[], list[np.ndarray]], expected: list[np.ndarray], most: float, advice: str
) -> Finding:
    """Returns the row of a path: its largest distance from what is expected, over that one's norm."""
    try:
        found = run()
    except Exception as error:  # compilers and drivers have errors of their own
        reason = " ".join(str(error).split())[:120]
        return Finding(name, f"fails: {type(error).__name__}: {reason}", "wrong", advice)
    pairs = zip(found, expected, strict=True)
    error = max(float(np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-6)) for one, other in pairs)
    # Written so that NaN is wrong.
    found = f"error {error:.1e}"
    return Finding(name, found) if error <= most else Finding(name, found, "wrong", advice)
