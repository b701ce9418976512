"""Frozen kernels of the decoder's projections in 8 or 4 bits, and the one door through which a layer reads a kernel.

int8 has one scale for each output channel. nf4 is QLoRA's NormalFloat (Dettmers et al. 2023, arXiv 2305.14314): one of
16 levels, with a scale for each tile of 64 inputs of a channel. Scales are by the largest absolute value. Embedding,
head, norms and the vision tower stay as they are: 5 % of a 7B, and the first and last arrays of a model suffer most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mole_jax.adapters.products import by_head
from mole_jax.config import Quantisation
from mole_jax.errors import UserError
from mole_jax.parallel.mesh import nearest_divisor
from mole_jax.parallel.sharding import mesh_axes, partition
from mole_jax.parameters import Parameter

TILE = 64
"""Inputs of a channel that share a scale in nf4; of fewer inputs, or others, the largest divisor of both."""
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What nf4's 16 codes stand for (arXiv 2305.14314, appendix E)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A kernel of I inputs and O outputs, or the stacked kernels of L layers; or what goes with each of its arrays."""

    values: Any
    """int8: (L, I, O). nf4: two codes a byte (uint8), (L, I/2, O); a tile's first half lies in the low bits."""
    scale: Any
    """int8: float32, (L, 1, O). nf4: bfloat16, (L, tiles, O)."""

    @property
    def kind(self) -> Quantisation:
        return "int8" if self.values.dtype == jnp.int8 else "nf4"

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def __getitem__(self, layer: Any) -> Quantised:
        """Returns a layer, or with ``...`` all, as an array does."""
        return Quantised(self.values[layer], self.scale[layer])


def quantises(path: str) -> bool:
    """Tells whether the parameter at `path` is one that is quantised."""
    return path.startswith("decoder/layers/") and path.endswith("_proj/kernel")


def quantise(kernels: Float[Array, "L I O"], kind: Quantisation) -> Quantised:
    """Returns stacked kernels quantised from their float32 values, one layer after the other."""

    import qwix  # only needed here and below, and slow to import

    def one(kernel: Float[Array, "I O"]) -> Quantised:
        wide = kernel.astype(jnp.float32)
        if kind == "int8":
            found = qwix.quantize(wide, jnp.int8, channelwise_axes=(1,))
            return Quantised(found.qvalue, found.scale)
        tile = tile_of(len(kernel))
        found = qwix.quantize(
            wide, "nf4", channelwise_axes=(1,), tiled_axes={0: tile}, scale_dtype=jnp.dtype(jnp.bfloat16)
        )
        halves = found.qvalue.astype(jnp.uint8).reshape(-1, 2, tile // 2, kernel.shape[1])
        packed = halves[:, 0] | halves[:, 1] << 4
        return Quantised(packed.reshape(-1, kernel.shape[1]), found.scale)

    return jax.lax.map(one, kernels)


def dequantise(kernel: Quantised, dtype: jnp.dtype) -> Float[Array, "I O"]:
    """Returns one layer's kernel in the type `dtype`."""
    if kernel.kind == "nf4":
        return _together(*_halves(kernel, dtype), tiles=len(kernel.scale), axis=0)
    import qwix

    return qwix.dequantize(qwix.QArray(_as_it_lies(kernel.values), kernel.scale)).astype(dtype)


def product(
    x: Float[Array, "B S I"], parameter: Parameter, width: int | None = None
) -> Float[Array, "B S O"] | Float[Array, "B H S C"]:
    """Returns ``x W`` in the type of `x`, however a layer's kernel W is stored; cut into heads if `width` is given."""
    kernel = parameter[...]
    if isinstance(kernel, Quantised):
        y = _product(x, kernel)
        return y if width is None else y.reshape(*y.shape[:-1], -1, width).swapaxes(1, 2)
    kernel = kernel.astype(x.dtype)
    return x @ kernel if width is None else by_head(x, kernel, width)


@jax.custom_vjp
def _product(x: Float[Array, "*B I"], kernel: Quantised) -> Float[Array, "*B O"]:
    """The derivative is written out: left to itself, it would keep the kernel in floats for the backward pass.

    The compiler makes floats within the product that reads them. It would not if halves of nf4 were put together first.
    """
    if kernel.kind == "int8":
        return x @ dequantise(kernel, x.dtype)
    wide, parts = jnp.promote_types(x.dtype, jnp.float32), x.reshape(*x.shape[:-1], len(kernel.scale), 2, -1)
    low, high = (
        jnp.matmul(parts[..., half, :].reshape(*x.shape[:-1], -1), weights, preferred_element_type=wide)
        for half, weights in enumerate(_halves(kernel, x.dtype))
    )
    return (low + high).astype(x.dtype)


def _backward(kernel: Quantised, dy: Float[Array, "*B O"]) -> tuple[Float[Array, "*B I"], None]:
    if kernel.kind == "int8":
        return dy @ dequantise(kernel, dy.dtype).T, None
    low, high = (dy @ weights.T for weights in _halves(kernel, dy.dtype))
    return _together(low, high, tiles=len(kernel.scale), axis=-1), None


_product.defvjp(lambda x, kernel: (_product(x, kernel), kernel), _backward)


def layer_specs(parameter: Parameter) -> PartitionSpec | Quantised:
    """Returns how one layer's parameter is cut over a mesh, as a tree of its value's own form."""
    value = parameter[...]
    spec = partition(*parameter.get_metadata("axes")[-value.ndim :])
    return _cut(spec, value.kind) if isinstance(value, Quantised) else spec


def abstract(path: str, shape: Sequence[int], kind: Quantisation, sharding: NamedSharding) -> Quantised:
    """Returns shape, type and sharding of the arrays that stacked kernels of `shape`, cut so, become.

    Raises:
        UserError: the mesh cuts through a tile, or the inputs are an odd number, of which no two share a byte.
    """
    layers, inputs, outputs = shape
    tile = tile_of(inputs)
    if kind == "int8":
        shapes = Quantised((tuple(shape), jnp.int8), ((layers, 1, outputs), jnp.float32))
    elif tile == 1:
        raise UserError(
            f"config: model.frozen_dtype nf4 packs inputs in pairs, {path} has {inputs}; set model.frozen_dtype int8"
        )
    else:
        shapes = Quantised(
            ((layers, inputs // 2, outputs), jnp.uint8), ((layers, inputs // tile, outputs), jnp.bfloat16)
        )
        left = inputs // tile
        for axis in mesh_axes(sharding.spec[-2]):
            parts = sharding.mesh.shape[axis]
            if left % parts:
                raise UserError(
                    f"config: mesh.{axis} {parts} cuts through the {left} tiles of {tile} inputs of {path}, each with "
                    f"a scale of its own in nf4; the nearest that does not is {nearest_divisor(left, parts)}, or set "
                    "model.frozen_dtype int8"
                )
            left //= parts
    specs = _cut(sharding.spec, kind)
    return Quantised(
        *(
            jax.ShapeDtypeStruct(*one, sharding=NamedSharding(sharding.mesh, spec))
            for one, spec in ((shapes.values, specs.values), (shapes.scale, specs.scale))
        )
    )


def tile_of(inputs: int) -> int:
    """Returns how many inputs share a scale in nf4."""
    return math.gcd(TILE, inputs)


def _cut(spec: PartitionSpec, kind: Quantisation) -> Quantised:
    """Returns how the arrays of a quantised kernel are cut where the kernel would be by `spec`."""
    return Quantised(spec, PartitionSpec(*spec[:-2], None, spec[-1]) if kind == "int8" else spec)


def _as_it_lies(values: Array) -> Array:
    """XLA:TPU would rather have some kernels transposed, and keeps a second copy of all layers for it."""
    return with_layout_constraint(values, Layout((0, 1)))


def _halves(kernel: Quantised, dtype: jnp.dtype) -> tuple[Float[Array, "I/2 O"], Float[Array, "I/2 O"]]:
    """Returns the first and the second half of every tile of an nf4 kernel."""
    # Not by qwix, whose look-up takes 40 % more cycles of a TPU with its product than the choices here.
    codes = _as_it_lies(kernel.values).astype(jnp.int32)
    scale = jnp.repeat(kernel.scale.astype(dtype), len(kernel.values) // len(kernel.scale), axis=0)
    return _level(codes & 15, dtype) * scale, _level(codes >> 4, dtype) * scale


def _together(first: Array, second: Array, *, tiles: int, axis: int) -> Array:
    """Joins what belongs to the first and the second halves of tiles, which lie along an axis."""
    axis %= first.ndim
    parts = (one.reshape(*one.shape[:axis], tiles, -1, *one.shape[axis + 1 :]) for one in (first, second))
    whole = jnp.concatenate(list(parts), axis=axis + 1)
    return whole.reshape(*first.shape[:axis], -1, *first.shape[axis + 1 :])


def _level(codes: Int[Array, "*A"], dtype: jnp.dtype) -> Float[Array, "*A"]:
    """Looks codes of 4 bits up in `LEVELS` by choosing between halves: a TPU has no fast look-up."""

    def among(levels: Sequence[float]) -> Array:
        if len(levels) == 1:
            return jnp.asarray(levels[0], dtype)
        half = len(levels) // 2
        return jnp.where(codes & half != 0, among(levels[half:]), among(levels[:half]))

    return among(LEVELS)
