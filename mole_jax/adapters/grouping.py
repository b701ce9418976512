"""Tokens sorted by expert, so that each is multiplied by its own expert only (`jax.lax.ragged_dot`)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Groups(NamedTuple):
    """An order of T tokens that puts those of one expert side by side."""

    order: Int[Array, " T"]
    """The token at each place."""
    place: Int[Array, " T"]
    """The place of each token."""
    sizes: Int[Array, " E"]
    """Number of tokens of each expert."""


def group(choice: Float[Array, "B S E"]) -> Groups:
    """Sorts tokens by expert; the tokens of one expert keep their order."""
    experts = choice.shape[-1]
    expert = jnp.argmax(choice, axis=-1).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    return Groups(order, place, jnp.bincount(expert, length=experts).astype(jnp.int32))


def sort_tokens(x: Float[Array, "B S D"], groups: Groups) -> Float[Array, "1 T D"]:
    """Returns the tokens of all rows in the order of `groups`."""
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

    With `all_gates` every gate has the gradient of the masked form, even those of experts that were not chosen
    (straight-through routing). Otherwise only the chosen gate has a gradient.
    """
    product = _with_all_gates if all_gates else _own_product
    return product(x[0], a, b, gates[0], choice[0].astype(gates.dtype), sizes)[None]


def _own_product(x: Array, a: Array, b: Array, gates: Array, choice: Array, sizes: Array) -> Array:
    own = (gates * choice).sum(axis=-1, keepdims=True)
    return _times_b(_times_a(x, a, sizes) * own, b, sizes)


def _times_a(x: Array, a: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, a.reshape(len(a), len(sizes), -1).swapaxes(0, 1), sizes)


def _times_b(h: Array, b: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(h, b.reshape(len(sizes), -1, b.shape[-1]), sizes)


_with_all_gates = jax.custom_vjp(_own_product)


def _all_gates_forward(*inputs: Array) -> tuple[Array, tuple]:
    return _own_product(*inputs), inputs


def _all_gates_backward(inputs: tuple, dy: Array) -> tuple:
    x, a, b, gates, choice, sizes = inputs
    # The gates of all experts need these products with all ranks, so a token's own part is taken from them. They are
    # split because a reshape to (T, E, R) makes a TPU change layouts.
    h, dh = (jnp.split(product, len(sizes), axis=-1) for product in (x @ a, jnp.einsum("to,ro->tr", dy, b)))
    own = (gates * choice).sum(axis=-1, keepdims=True)
    h_own, dh_own = (sum(part * choice[:, e, None] for e, part in enumerate(parts)) for parts in (h, dh))
    dgates = jnp.stack([(one * other).sum(axis=-1) for one, other in zip(h, dh, strict=True)], axis=-1)
    dx, da = jax.vjp(lambda x, a: _times_a(x, a, sizes), x, a)[1](dh_own * own)
    (db,) = jax.vjp(lambda b: _times_b(h_own * own, b, sizes), b)[1](dy)
    return dx, da, db, dgates, None, None


_with_all_gates.defvjp(_all_gates_forward, _all_gates_backward)


@jax.custom_vjp
def _permute(x: Array, order: Array, place: Array) -> Array:
    # The gradient is the inverse permutation; JAX's own would scatter-add into zeros, row by row.
    return x[order]


_permute.defvjp(lambda x, order, place: (x[order], place), lambda place, dy: (dy[place], None, None))
