"""Mean and deviation of what routers by instance read, measured before the first step (`adapter.router_input`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mole_jax.adapters.mixture import pooled
from mole_jax.config import Config
from mole_jax.data.mixture import Mixture
from mole_jax.model.llava import Llava
from mole_jax.model.objective import Arrays, hints
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.sharding import put_batch, replicated
from mole_jax.parameters import Tree, flatten, unflatten

EXAMPLES = 1000
"""How many of the first examples are looked at: whole batches, until there are as many."""
LEAST = 1e-2
"""No dimension counts as less spread than this share of the mean deviation: one that is constant says nothing."""


def standardised(
    config: Config, spec: ModelSpec, mesh: jax.sharding.Mesh, params: Tree, frozen: Tree, mixture: Mixture
) -> Tree:
    """Returns the trainable parameters with the routers' mean and deviation measured on the first examples of the run.

    The mixture stands where it stood. On several hosts, every process has to ask.
    """
    program = jax.jit(lambda *trees: _sums(config, spec, *trees), out_shardings=replicated(mesh))
    begin, total = mixture.get_state(), np.zeros(())
    sums = np.zeros((2, spec.arch.decoder.width))
    while total < EXAMPLES and (batch := next(mixture, None)) is not None:
        with jax.set_mesh(mesh):
            count, added = jax.device_get(program(params, frozen, put_batch(batch.arrays(), mesh)))
        total, sums = total + count, sums + np.asarray(added, np.float64)
    mixture.set_state(begin)
    mean, square = sums / max(float(total), 1.0)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    deviation = np.maximum(deviation, LEAST * deviation.mean())
    measured = {"/router/mean": mean, "/router/deviation": deviation}

    def of(path: str, leaf: Array) -> Array:
        value = next((value for end, value in measured.items() if path.endswith(end)), None)
        if value is None:
            return leaf
        return jax.device_put(np.broadcast_to(value, leaf.shape).astype(leaf.dtype), leaf.sharding)

    return unflatten({path: of(path, leaf) for path, leaf in flatten(params).items()})


def _sums(
    config: Config, spec: ModelSpec, params: Tree, frozen: Tree, batch: Arrays
) -> tuple[Float[Array, ""], Float[Array, "2 D"]]:
    """Returns the examples of a batch, and the sums over them of what a router reads and of its square."""
    model: Llava = nnx.merge(spec.graph, params, frozen)
    x = model.embed(
        batch["tokens"],
        batch["images"],
        jnp.dtype(config.model.compute_dtype),
        kernel=config.model.attention,
        sources=batch.get("sources"),
        weights=batch.get("weights"),
    )
    segments = batch["segment_ids"]
    same = segments[:, :, None] == segments[:, None, :]
    inputs = pooled(x, same & hints(batch).prompt[:, None, :])
    first = ((batch["positions"] == 0) & (segments > 0)).astype(inputs.dtype)
    moments = jnp.stack([jnp.einsum("bs,bsd->d", first, power) for power in (inputs, jnp.square(inputs))])
    return first.sum(), moments
