"""What tracing tells of a step: products as often as they are done, and what each remat policy keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from configs.llava15_7b_mole import get_config
from mole_jax.config import Remat
from mole_jax.model.architecture import preset
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.planning.work import Work, products, stacked, work_of
from mole_jax.training.flops import step_flops
from tests import tiny


def test_products_are_counted_as_often_as_they_are_done():
    def function(x, w):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x.T, lambda x: x @ x.T @ x @ x.T, x)

    traced = jax.jit(function).trace(jnp.zeros((4, 8)), jnp.zeros((3, 8, 8)))
    assert products(traced.jaxpr.jaxpr) == 3 * 2 * 4 * 8 * 8 + 2 * (4 * 8 * 4 + 4 * 4 * 8 + 4 * 8 * 4)
    mesh = make_mesh(dataclasses.replace(tiny.config(Path("data")).mesh, data=8))
    spread = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    assert products(jax.jit(spread).trace(jnp.zeros((16, 4))).jaxpr.jaxpr) == 8 * 2 * 2 * 4 * 2


def test_a_kernel_counts_with_what_it_declares():
    def double(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    cost = pl.CostEstimate(flops=1000, transcendentals=0, bytes_accessed=0)
    x = jnp.zeros((8, 8))
    kernel = pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=cost)
    run = jax.jit(lambda x: jax.lax.scan(lambda x, _: (kernel(x), None), x, None, length=3)[0])
    assert products(run.trace(x).jaxpr.jaxpr) == 3000


def test_what_a_loop_stacks_for_its_backward_pass():
    def loss(w, x):
        layer = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None), prevent_cse=False)
        return jax.lax.scan(layer, x, w)[0].sum()

    shapes = jax.ShapeDtypeStruct((4, 32, 32), jnp.float32), jax.ShapeDtypeStruct((6, 32), jnp.float32)
    jaxpr = jax.jit(jax.value_and_grad(loss)).trace(*shapes).jaxpr.jaxpr
    # Each layer's input, and not the weights' gradients, which the loop backwards stacks.
    assert stacked(jaxpr, 4) == 4 * 6 * 32 * 4
    assert stacked(jaxpr, 5) == 0


@pytest.fixture(scope="module")
def works() -> dict[str, Work]:
    config = get_config()
    config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, dropout=0.0))
    return work_of(config, preset("vicuna-7b"), jax.devices()[0])


def test_a_policy_that_keeps_more_computes_less(works):
    assert set(works) == set(get_args(Remat))
    kept, flops = zip(*((work.kept, work.flops) for work in works.values()), strict=True)
    assert list(kept) == sorted(kept, reverse=True)
    assert list(flops) == sorted(flops)


def test_the_7b_with_everything_recomputed_keeps_its_layers_inputs(works):
    inputs = 32 * 4096 * 2
    assert inputs <= works["full"].kept <= 1.05 * inputs
    assert works["full"].kept_on(preset("vicuna-7b"), 4) == pytest.approx(inputs, rel=0.05)
    none = works["none"]
    assert none.kept_on(preset("vicuna-7b"), 4) == pytest.approx(inputs + (none.kept - inputs) / 4)


def test_products_of_the_7b_are_those_that_its_shapes_tell_of(works):
    config, arch = get_config(), preset("vicuna-7b")
    tokens = config.train.batch_rows * config.data.sequence_length
    told = step_flops(config, arch, ModelSpec.of(arch, config.adapter).declarations, config.train.trainable) / tokens
    # With nothing recomputed but the head's logits; all scores where a kernel does not leave half of them out.
    assert told < works["none"].flops < 1.25 * told
    # Everything again but the last product of a layer, whose result no gradient needs; and attention and adapters.
    again = 2 * 32 * (4 * 4096**2 + 2 * 4096 * 11008)
    assert again < works["full"].flops - works["none"].flops < 1.25 * again
