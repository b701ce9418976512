"""Layers that the vision tower, the projector and the decoder share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mole_jax.config import Remat
from mole_jax.model.kernels.saved import ATTENTION, PROJECTED, QUERIES_KEYS_VALUES
from mole_jax.parallel.region import GATHERED
from mole_jax.parameters import Declare, normal, ones, zeros

KEPT: dict[Remat, tuple[str, ...]] = {
    "full": (),
    "attention": (ATTENTION, QUERIES_KEYS_VALUES),
    "most": (ATTENTION, QUERIES_KEYS_VALUES, PROJECTED),
}
"""Names that a layer keeps for its backward pass."""


def rematerialised(layer: Callable, remat: Remat) -> Callable:
    """Returns the body of a layer scan whose backward pass recomputes all that `remat` does not keep.

    Gathered parameters are always gathered again, because keeping them would undo their being split over devices.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        policy = policies.save_anything_except_these_names(GATHERED)
    else:
        policy = policies.save_only_these_names(*KEPT[remat])
    # A scan compiles the body once, so common-subexpression elimination cannot undo the rematerialisation.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


class Linear(nnx.Module):
    """``x W + b`` in the type of `x`; W is (D_in, D_out), torch's ``weight`` transposed."""

    def __init__(self, declare: Declare, d_in: int, d_out: int, axes: tuple[str, str], *, bias: bool = False):
        self.kernel = declare((d_in, d_out), axes, normal(d_in**-0.5), decay=True)
        self.bias = declare((d_out,), ("width",), zeros) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation, in float32 inside."""

    def __init__(self, declare: Declare, width: int, eps: float):
        self.scale = declare((width,), ("width",), ones)
        self.bias = declare((width,), ("width",), zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = wide.mean(axis=-1, keepdims=True)
        variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
        normal = (wide - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, in float32 inside."""

    def __init__(self, declare: Declare, width: int, eps: float):
        self.scale = declare((width,), ("width",), ones)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        # The scale is applied after rounding to the activations' type, as in transformers' LlamaRMSNorm.
        return normal.astype(x.dtype) * self.scale[...].astype(x.dtype)


def once[T](x: T) -> T:
    """Returns `x`, written before it is read.

    XLA:TPU would fuse what is cheap to compute into the products that read it, and compute it again for each of a
    product's tiles (docs/pods.md).
    """
    return jax.lax.optimization_barrier(x)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Returns ``silu(gate) * up``; its result and both gradients are written once."""
    return once(jax.nn.silu(gate) * up)


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    gate, up = saved
    share = jax.nn.sigmoid(gate)
    slope = share * (1 + gate * (1 - share))
    return once((dy * up * slope, dy * gate * share))


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
