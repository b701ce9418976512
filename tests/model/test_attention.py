"""Attention against its definition, token by token, and what a layer scan keeps of its mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.adapters.build import Adapters
from mole_jax.config import AdapterConfig
from mole_jax.model.architecture import PRESETS
from mole_jax.model.attention import attention
from mole_jax.model.decoder import Decoder
from mole_jax.parameters import Declare, DecoderParam, declared, streams, unflatten

ROWS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8


def drawn(length: int, slots: int):
    shapes = (ROWS, length, HEADS, WIDTH), (ROWS, slots, KV_HEADS, WIDTH), (ROWS, slots, KV_HEADS, WIDTH)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_definition(q, k, v, sees) -> np.ndarray:
    """Each query by itself; `sees(row, query)` lists its keys."""
    y = np.zeros((ROWS, q.shape[1], HEADS, WIDTH))
    for row, i, head in np.ndindex(y.shape[:3]):
        keys, group = sees(row, i), head // (HEADS // KV_HEADS)
        scores = np.asarray(k[row, keys, group] @ q[row, i, head]) / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        y[row, i, head] = weights @ np.asarray(v[row, keys, group]) / weights.sum()
    return y.reshape(ROWS, q.shape[1], HEADS * WIDTH)


def same(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_a_token_sees_its_own_segment_up_to_itself():
    q, k, v = drawn(6, 6)
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 0, 0]])
    found = attention(q, k, v, causal=True, segment_ids=jnp.asarray(segments))
    same(
        found, by_definition(q, k, v, lambda row, i: [j for j in range(i + 1) if segments[row, j] == segments[row, i]])
    )


def test_without_segments_a_token_sees_the_row_up_to_itself():
    q, k, v = drawn(5, 5)
    same(attention(q, k, v, causal=True), by_definition(q, k, v, lambda _, i: list(range(i + 1))))


def test_images_see_all_of_themselves():
    q, k, v = drawn(5, 5)
    same(attention(q, k, v, causal=False), by_definition(q, k, v, lambda *_: list(range(5))))


@pytest.mark.parametrize("kernel", ["xla", "blocks"])
@pytest.mark.parametrize("remat", ["none", "most", "attention", "full"])
def test_the_mask_is_not_kept_for_every_layer(remat, kernel):
    """It is made inside of the layer, so a backward pass could keep one a layer: S x S bytes for each row and head."""
    arch, length = PRESETS["tiny"].decoder, 13
    config = AdapterConfig(rank=2, dropout=0.0)
    model = nnx.eval_shape(lambda: Decoder(Declare(DecoderParam, streams(0)), arch, Adapters(config)))
    graph = nnx.graphdef(model)
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, "float32") for path, leaf in declared(model).items()}
    ids = jax.ShapeDtypeStruct((2, length), "int32")

    def loss(leaves, x, positions, segments):
        return nnx.merge(graph, unflatten(leaves))(x, positions, segments, remat=remat, kernel=kernel)[0].sum()

    x = jax.ShapeDtypeStruct((2, length, arch.width), "float32")
    program = jax.make_jaxpr(jax.grad(loss))(leaves, x, ids, ids)
    scans = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 2, "one forward, one backward"
    squares = [
        out.aval
        for scan in scans
        for out in scan.outvars
        if out.aval.shape[:1] == (arch.layers,) and out.aval.shape[-2:] == (length, length)
    ]
    # By definition and with remat none the probabilities are kept: this looks at the right arrays.
    assert bool(squares) == (remat == "none" and kernel == "xla")
    assert not [one for one in squares if one.dtype == bool]
