"""Layers whose gradient is written by hand, against the one that JAX works out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.model.layers import swiglu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swiglu_and_its_gradients_are_those_of_silu_times_up(dtype):
    rng = np.random.default_rng(0)
    gate, up, dy = (jnp.asarray(3 * rng.normal(size=(2, 5, 16)), dtype) for _ in range(3))
    y, pull = jax.vjp(swiglu, gate, up)
    expected, pull_expected = jax.vjp(
        lambda gate, up: jax.nn.silu(gate) * up, *(x.astype("float32") for x in (gate, up))
    )
    rtol = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]  # bfloat16 has 8 bits
    for ours, theirs in zip((y, *pull(dy)), (expected, *pull_expected(dy.astype("float32"))), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=rtol, atol=rtol)
