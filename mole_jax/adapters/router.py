"""The router: which expert a token goes to, and how the language-model loss reaches that choice."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mole_jax.adapters.grouping import Groups
from mole_jax.config import RouterGradient
from mole_jax.parameters import Declare, RouterParam, kaiming_uniform, ones, zeros


class Routing(NamedTuple):
    """A router's choice for each token; arrays are float32."""

    gates: Float[Array, "B S E"]
    """Factor of each expert's delta."""
    probs: Float[Array, "B S E"]
    """Softmax of the logits."""
    choice: Float[Array, "B S E"]
    """One-hot of the most probable expert."""
    groups: Groups | None = None
    """Their order, when the tokens are sorted by expert."""


def route(logits: Float[Array, "B S E"], gradient: RouterGradient) -> Routing:
    """Turns router logits into gates.

    The released block does not multiply the expert's output by its probability, so the router gets no gradient from
    the language-model loss (`none`). `straight_through` has the same forward pass and the gradient of the soft
    mixture; `gate_scaled` multiplies by the chosen probability; `dense` mixes all experts, as the released inference
    does.
    """
    probs = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    choice = jax.nn.one_hot(jnp.argmax(probs, axis=-1), probs.shape[-1], dtype=probs.dtype)
    match gradient:
        case "none":
            gates = choice
        case "straight_through":
            gates = choice + (probs - jax.lax.stop_gradient(probs))
        case "gate_scaled":
            gates = choice * probs
        case "dense":
            gates = probs
    return Routing(gates, probs, choice)


class Router(nnx.Module):
    """One linear map that the gate, up and down projections of a decoder layer share, or those of all layers."""

    def __init__(self, declare: Declare, width: int, experts: int, *, bias: bool, standardised: bool = False):
        declare = declare.of(RouterParam)
        self.kernel = declare((width, experts), ("width", "width"), kaiming_uniform, decay=True)
        self.bias = declare((experts,), ("width",), zeros) if bias else None
        # Measured once before the first step, and never trained.
        self.mean = declare((width,), ("width",), zeros) if standardised else None
        self.deviation = declare((width,), ("width",), ones) if standardised else None

    def inputs(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns what the kernel is multiplied with: `x`, or `x` standardised."""
        if self.mean is None or self.deviation is None:
            return x
        mean, deviation = (jax.lax.stop_gradient(one[...]) for one in (self.mean, self.deviation))
        return (x - mean) / deviation

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S E"]:
        """Returns each token's logits."""
        logits = router_logits(self.inputs(x), self.kernel[...])
        return logits if self.bias is None else logits + self.bias[...]


def router_logits(x: Float[Array, "B S D"], kernel: Float[Array, "D E"]) -> Float[Array, "B S E"]:
    """Returns logits in float32, whatever the type of `x` (float64 stays)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    # The default precision would round the operands to bfloat16 on a TPU and flip close choices.
    return jnp.einsum("bsd,de->bse", x.astype(dtype), kernel, precision=jax.lax.Precision.HIGHEST)
