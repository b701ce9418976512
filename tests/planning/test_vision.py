"""The vision tower as the TPU's own compiler cuts it: its weights are gathered, its products left whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.config import AdapterConfig, MeshConfig
from mole_jax.model.architecture import preset
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import batch_sharding
from mole_jax.planning import topology
from mole_jax.planning.cost import Cost, cost_of
from mole_jax.planning.hlo import HloModule

LAYERS = 4


def tower(fsdp: int) -> Cost:
    """The forward pass of CLIP-L with fewer layers over 8 images on each of 16 chips."""
    arch = preset("vicuna-7b")
    vision = dataclasses.replace(arch.vision, layers=LAYERS)
    spec = ModelSpec.of(dataclasses.replace(arch, vision=vision), AdapterConfig(kind="none"))
    mesh = make_mesh(MeshConfig(data=-1, fsdp=fsdp), topology.devices_of("v5e:4x4"))
    weights = spec.abstract(mesh, (), "bfloat16")
    side = vision.image_size
    pixels = jax.ShapeDtypeStruct((8 * 16, side, side, 3), np.dtype(jnp.bfloat16), sharding=batch_sharding(mesh))

    def run(weights, pixels):
        return nnx.merge(spec.graph, weights).vision(pixels, -1)

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(weights, pixels).compile().as_text()
    assert text is not None
    return cost_of(HloModule(text), dict(mesh.shape))


@pytest.mark.slow
@pytest.mark.skipif(
    not topology._installed("libtpu"),
    reason="needs libtpu to compile for a TPU (no hardware): 'jax[tpu]' in an environment of its own",
)
def test_over_16_devices_a_tower_costs_what_it_costs_over_8(monkeypatch):
    for name, value in topology.TPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    few, many = tower(8), tower(16)
    assert {one.kind for one in many.collectives} == {"all-gather"}
    assert sum(one.count for one in many.collectives) == sum(one.count for one in few.collectives)
    assert many.cycles == pytest.approx(few.cycles, rel=0.02)
