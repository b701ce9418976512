"""Checksums of a checkpoint's arrays: the bits of an array as whole numbers, summed with odd weights.

Any single bit that is another one changes the sum. It is exact, so it does not depend on how an array lies on devices,
and a file's array and a placed one have the same. Layers that are stacked have one each, as they are read alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from mole_jax.weights.leaf import LAYERS

Checksums = Mapping[str, Sequence[int]]
"""Of each array by path: a number for each layer, or one where layers are not stacked."""


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, list[int]]:
    """Returns the sums of placed arrays; on several hosts, all of them have to ask."""
    if not arrays:
        return {}
    sharding = next(iter(arrays.values())).sharding
    everywhere = (
        jax.sharding.NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, jax.sharding.NamedSharding) else None
    )
    found = jax.jit(lambda arrays: {path: _sums(path, one) for path, one in arrays.items()}, out_shardings=everywhere)(
        arrays
    )
    return {path: np.asarray(sums).tolist() for path, sums in jax.device_get(found).items()}


def _sums(path: str, array: Array) -> UInt32[Array, " parts"]:
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
    parts = bits if LAYERS in path else bits[None]
    places = jnp.arange(parts[0].size, dtype=jnp.uint32).reshape(parts.shape[1:])
    return (parts * (2 * places + 1)).sum(axis=tuple(range(1, parts.ndim)), dtype=jnp.uint32)


def checksum(part: np.ndarray) -> int:
    """Returns the sum of one layer, or of an array whose layers are not stacked."""
    bits = np.ascontiguousarray(part).reshape(-1).view(f"u{part.dtype.itemsize}").astype(np.uint32)
    return int((bits * (2 * np.arange(bits.size, dtype=np.uint32) + 1)).sum(dtype=np.uint32))


def changed(arrays: Mapping[str, jax.Array], written: Checksums) -> str | None:
    """Returns the path of an array that is not what was written; None if all are, or were written without a sum."""
    known = {path: one for path, one in arrays.items() if path in written}
    return next((path for path, sums in checksums(known).items() if sums != list(written[path])), None)
