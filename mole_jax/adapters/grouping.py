"""Tokens sorted by expert, so that each is multiplied with its own expert only (`jax.lax.ragged_dot`)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mole_jax.parallel.devices import kind_in_force

GROUPED_FROM = {"TPU": 1024}
"""Stacked ranks E * R from which sorting is known to pay, by the first word of `device_kind` (docs/pods.md).

Elsewhere it is never chosen: on a CPU `ragged_dot` does all the work of the masked form and more
(`python -m benchmarks` measures both).
"""

FEW_TOKENS = 1024
"""Up to so many tokens (decoding) a sort costs more than it saves."""


class Groups(NamedTuple):
    """An order of T tokens in which those of one expert are neighbours."""

    order: Int[Array, " T"]
    """Which token stands at each place."""
    place: Int[Array, " T"]
    """At which place each token stands."""
    sizes: Int[Array, " E"]
    """Tokens of each expert."""


def pays(ranks: int, tokens: int) -> bool:
    """Returns whether sorting is faster than masking on the devices in force, for `ranks` = E * R."""
    return tokens > FEW_TOKENS and ranks >= GROUPED_FROM.get(kind_in_force(), np.inf)


def group(choice: Float[Array, "B S E"]) -> Groups:
    """Sorts tokens by their expert, tokens of one expert in their order."""
    experts = choice.shape[-1]
    expert = jnp.argmax(choice, axis=-1).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    return Groups(order, place, jnp.bincount(expert, length=experts).astype(jnp.int32))


def sort_tokens(x: Float[Array, "B S D"], groups: Groups) -> Float[Array, "1 T D"]:
    return _permute(x.reshape(-1, x.shape[-1]), groups.order, groups.place)[None]


def unsort_tokens(x: Float[Array, "1 T D"], groups: Groups, shape: tuple[int, ...]) -> Float[Array, "B S D"]:
    """Puts sorted tokens back into rows of `shape` (B, S)."""
    return _permute(x[0], groups.place, groups.order).reshape(*shape, -1)


def grouped(
    x: Float[Array, "1 T I"],
    a: Float[Array, "I E*R"],
    b: Float[Array, "E*R O"],
    gates: Float[Array, "1 T E"],
    choice: Float[Array, "1 T E"],
    sizes: Int[Array, " E"],
    *,
    all_gates: bool,
) -> Float[Array, "1 T O"]:
    """Returns ``gate_k x A_k B_k`` of each token's own expert k; tokens and gates are in sorted order.

    With `all_gates` the gradient of every gate is that of the masked form, also of experts that were not chosen
    (straight-through routing); else it is that of the chosen gate.
    """
    experts = gates.shape[-1]
    own = (gates * choice.astype(gates.dtype)).sum(axis=-1)[0, :, None]
    h = jax.lax.ragged_dot(x[0], a.reshape(len(a), experts, -1).swapaxes(0, 1), sizes)
    y = jax.lax.ragged_dot(h * own, b.reshape(experts, -1, b.shape[-1]), sizes)[None]
    if all_gates:
        rest = gates * (1 - choice.astype(gates.dtype))
        y = _with_gates_of_others(y, rest, jax.lax.stop_gradient((x, a, b)))
    return y


@jax.custom_vjp
def _with_gates_of_others(y: Array, gates: Array, weights: tuple[Array, Array, Array]) -> Array:
    """Adds nothing to y, for the gates of experts that were not chosen are 0, but sends them the masked form's
    gradient."""
    return y


def _gates_forward(y: Array, gates: Array, weights: tuple[Array, Array, Array]) -> tuple[Array, tuple]:
    return y, (gates.shape[-1], weights)


def _gates_backward(saved: tuple, dy: Array) -> tuple:
    experts, (x, a, b) = saved
    products = (x @ a) * jnp.einsum("bto,ro->btr", dy, b)
    return dy, products.reshape(*products.shape[:-1], experts, -1).sum(axis=-1), None


_with_gates_of_others.defvjp(_gates_forward, _gates_backward)


@jax.custom_vjp
def _permute(x: Array, order: Array, place: Array) -> Array:
    # Its gradient is the inverse permutation; left to itself JAX would add into zeros, row by row.
    return x[order]


_permute.defvjp(lambda x, order, place: (x[order], place), lambda place, dy: (dy[place], None, None))
