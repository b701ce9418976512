"""A new adapter kind is one file: one is made here, and the decoder takes it."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mole_jax.adapters import build
from mole_jax.adapters.build import Adapters
from mole_jax.adapters.kind import Kind, Projection
from mole_jax.config import AdapterConfig
from mole_jax.model.architecture import PRESETS
from mole_jax.model.decoder import Decoder
from mole_jax.parameters import AdapterParam, Declare, DecoderParam, declared, streams, unflatten, zeros

ARCH = PRESETS["tiny"].decoder


class Growth(nnx.Module):
    """Adds ``g * sum(x)`` to every output."""

    def __init__(self, declare: Declare, projection: Projection):
        self.g = declare.of(AdapterParam)((projection.d_out,), (projection.axes[1],), zeros)

    def __call__(self, x, routing, width=None):
        assert routing is None
        y = x.sum(axis=-1, keepdims=True) * self.g[...]
        return y if width is None else y.reshape(*y.shape[:2], -1, width).swapaxes(1, 2)


def decoder(**adapter) -> Decoder:
    return Decoder(Declare(DecoderParam, streams(0)), ARCH, Adapters(AdapterConfig(dropout=0, **adapter)))


def hidden(model: Decoder) -> np.ndarray:
    x = jax.random.normal(jax.random.key(1), (2, 5, ARCH.width))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    y, use = model(x, positions, jnp.ones((2, 5), jnp.int32), segments=1, key=jax.random.key(2))
    assert use is None
    return np.asarray(y)


def test_every_kind_of_the_settings_is_built():
    assert set(build.KINDS) == set(typing.get_args(typing.get_type_hints(AdapterConfig)["kind"]))


def test_a_kind_from_one_file_is_applied_where_it_is_targeted(monkeypatch):
    monkeypatch.setattr(build, "KINDS", {**build.KINDS, "growth": Kind(lambda _, *place: Growth(*place))})
    plain, grown = decoder(kind="none"), decoder(kind="growth", targets=("q_proj", "down_proj"))
    added = sorted(declared(grown).keys() - declared(plain).keys())
    assert added == ["layers/attention/q_proj/adapter/g", "layers/mlp/down_proj/adapter/g"]
    np.testing.assert_array_equal(hidden(grown), hidden(plain))  # it starts at zero
    leaves = {path: one[...] for path, one in declared(grown).items()}
    graph = nnx.graphdef(grown)
    # The same as adding g to every column of the frozen matrix.
    leaves[added[1]] = jax.random.normal(jax.random.key(3), leaves[added[1]].shape)
    folded = {path: one for path, one in leaves.items() if path not in added}
    folded["layers/mlp/down_proj/kernel"] += leaves[added[1]][:, None, :]
    expected = hidden(nnx.merge(nnx.graphdef(plain), unflatten(folded)))
    np.testing.assert_allclose(hidden(nnx.merge(graph, unflatten(leaves))), expected, atol=1e-5)
    assert np.abs(expected - hidden(plain)).max() > 0.1
