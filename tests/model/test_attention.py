"""Attention against its definition, token by token, and what a layer scan keeps of its mask."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.adapters.build import Adapters
from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.model.architecture import PRESETS
from mole_jax.model.attention import attention, check
from mole_jax.model.decoder import Decoder
from mole_jax.model.kernels import gpu
from mole_jax.parameters import Declare, DecoderParam, declared, streams, unflatten

ROWS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8


def drawn(length: int, slots: int):
    shapes = (ROWS, HEADS, length, WIDTH), (ROWS, KV_HEADS, slots, WIDTH), (ROWS, KV_HEADS, slots, WIDTH)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_definition(q, k, v, sees) -> np.ndarray:
    """Each query by itself; `sees(row, query)` lists its keys."""
    y = np.zeros((ROWS, q.shape[2], HEADS, WIDTH))
    for row, i, head in np.ndindex(y.shape[:3]):
        keys, group = sees(row, i), head // (HEADS // KV_HEADS)
        scores = np.asarray(k[row, group][np.asarray(keys)] @ q[row, head, i]) / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        y[row, i, head] = weights @ np.asarray(v[row, group][np.asarray(keys)]) / weights.sum()
    return y.reshape(ROWS, q.shape[2], HEADS * WIDTH)


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


@pytest.mark.parametrize("length", [1, 130, 300])
@pytest.mark.parametrize(("causal", "packed"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("kernel", ["blocks", "splash"])
def test_kernels_agree_with_the_definition_in_values_and_gradients(kernel, causal, packed, length):
    """Odd lengths, grouped heads, several blocks; the reference is jax.nn's attention with a mask of S x S."""
    if kernel == "splash":
        pytest.importorskip("tokamax", reason="splash attention needs tokamax (extra kernels)")
    q, k, v = drawn(length, length)
    dy = jax.random.normal(jax.random.key(1), (ROWS, length, HEADS * WIDTH))
    bounds = np.array([[0.3, 0.5, 0.9], [0.0, 0.6, 1.0]]) * length
    segments = jnp.asarray((np.arange(length)[None, :, None] >= bounds[:, None]).sum(axis=-1)) if packed else None

    def with_gradients(kernel):
        run = functools.partial(attention, causal=causal, segment_ids=segments, kernel=kernel)
        y, pull = jax.vjp(run, q, k, v)
        return y, *pull(dy)

    for found, expected in zip(with_gradients(kernel), with_gradients("xla"), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)


def test_the_first_key_of_each_token_is_where_its_segment_begins():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [3, 4, 4, 0, 0, 0]])
    np.testing.assert_array_equal(gpu.first_keys(segments), [[0, 0, 2, 2, 2, 5], [0, 1, 1, 3, 3, 3]])


def test_gpu_kernels_are_told_the_mask_that_the_definition_has():
    """tokamax turns `k_start` into the mask that its kernels stand for."""
    base = pytest.importorskip("tokamax._src.ops.attention.base", reason="needs tokamax (extra kernels)")
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0, 0]])
    mask = base.Mask(k_start=gpu.first_keys(segments)[:, None], is_causal=True).as_array(7, 7)
    places = np.arange(7)
    expected = (places <= places[:, None]) & np.asarray(segments[0][:, None] == segments[0])
    np.testing.assert_array_equal(mask[0, 0], expected)


@pytest.mark.parametrize(("kernel", "kind"), [("splash", "cpu"), ("mosaic", "TPU"), ("triton", "cpu")])
def test_a_kernel_for_other_devices_is_refused(kernel, kind):
    with pytest.raises(UserError, match=f"model.attention {kernel} runs on .* not on {kind}"):
        check(kernel, kind)


def test_any_device_takes_what_is_plain_jax():
    for kernel in ("auto", "xla", "blocks"):
        check(kernel, "cpu")


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
