"""The fingerprint of a model: of its content, wherever the arrays lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mole_jax.config import AdapterConfig, Config, MeshConfig
from mole_jax.evaluation.pins import fingerprint, first_difference
from mole_jax.model.architecture import preset
from mole_jax.parallel.mesh import make_mesh

ARCH = preset("tiny")
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(8, 6)).astype(np.float32)
LEAVES = {
    "decoder": {"kernel": KERNEL, "norm": np.ones(4, np.float32)},
    "router": RNG.normal(size=6).astype("bfloat16"),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])


def of(mesh, tree, *more, **adapter):
    return fingerprint(Config(adapter=AdapterConfig(**adapter)), ARCH, mesh, jax.tree.map(jnp.asarray, tree), *more)


def test_the_cut_over_devices_and_trees_does_not_matter(mesh):
    whole = of(mesh, LEAVES)
    place = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    cut = {"decoder": LEAVES["decoder"] | {"kernel": jax.device_put(KERNEL, place)}, "router": LEAVES["router"]}
    assert of(mesh, cut) == whole
    assert of(mesh, {"router": LEAVES["router"]}, {"decoder": LEAVES["decoder"]}) == whole


def test_every_bit_and_its_place_matter(mesh):
    found = {of(mesh, LEAVES), of(mesh, LEAVES, router_gradient="dense")}
    changed = [KERNEL.copy() for _ in range(4)]
    changed[0].view(np.uint32)[3, 4] ^= 1
    changed[1][[0, 5]] = changed[1][[5, 0]]
    changed[2][:, [1, 2]] = changed[2][:, [2, 1]]
    changed[3][0, 0] *= -1
    for kernel in (*changed, KERNEL.reshape(6, 8), KERNEL.T.copy(), KERNEL.view(np.int32)):
        found.add(of(mesh, LEAVES | {"decoder": LEAVES["decoder"] | {"kernel": kernel}}))
    found.add(of(mesh, {"decoder": LEAVES["decoder"], "routers": LEAVES["router"]}))
    found.add(of(mesh, {"decoder": LEAVES["decoder"]}))
    assert len(found) == 2 + 7 + 2


def test_the_first_difference_is_named():
    pins = {"weights": "a", "prompt": "v1", "decoding": {"temperature": 0.0}}
    assert first_difference(pins, dict(pins)) is None
    assert first_difference(pins, pins | {"decoding": {"temperature": 1.0}}) == "decoding"
    assert first_difference(pins, pins | {"weights": "b"}) == "weights"
    assert first_difference(pins, pins | {"weights": "b"}, but="weights") is None
    assert first_difference(pins, pins | {"later": 1}) == "later"
