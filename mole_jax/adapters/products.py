"""Matrix products in the layouts that are fastest for what comes after them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mole_jax.adapters.tuning import one_token_axis_pays


def joined(x: Float[Array, "B S I"]) -> Float[Array, "*T I"]:
    """Returns rows and tokens as one axis where that is faster."""
    return x.reshape(-1, x.shape[-1]) if one_token_axis_pays() else x


def by_head(x: Float[Array, "B S I"], matrix: Float[Array, "I H*C"], width: int) -> Float[Array, "B H S C"]:
    """Returns ``x @ matrix`` cut into heads of a width C.

    A TPU writes the product so at once; cut afterwards it would be copied, and so would each of its parts. Of one token
    a row there is nothing to copy, and the barrier keeps XLA from turning the matrix round for the heads.
    """
    if x.shape[1] == 1:
        return jax.lax.optimization_barrier(x @ matrix).reshape(len(x), -1, 1, width)
    return jnp.einsum("bsi,ihc->bhsc", x, matrix.reshape(len(matrix), -1, width))
