"""Every way to compute the experts, on one device and on many, against the masked form on one device."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mole_jax.adapters import expert_sharding
from mole_jax.adapters.build import Adapters
from mole_jax.config import AdapterConfig, Config, DataConfig, DomainConfig, MeshConfig, ModelConfig, TrainConfig
from mole_jax.config_check import check
from mole_jax.errors import UserError
from mole_jax.model.architecture import DecoderArchitecture
from mole_jax.model.decoder import Decoder
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import batch_sharding, parameter_sharding
from mole_jax.parameters import Declare, DecoderParam, declared, streams, unflatten

ARCH = DecoderArchitecture(vocab=8, width=16, mlp_width=24, layers=2, heads=4, kv_heads=2, head_dim=4, max_position=8)
ROWS, LENGTH, EXPERTS = 8, 5, 4

ROUTING = {
    "spread": np.zeros((2, EXPERTS)),
    "one expert gets nothing": np.array([[0, -50, 0, 0], [0, 0, 0, -50]]),
    "all on one expert": np.array([[0, 0, 50, 0], [50, 0, 0, 0]]),
}
"""Router biases by layer."""


def adapter(**changes) -> AdapterConfig:
    settings = {"rank": 3, "alpha": 6.0, "dropout": 0.2, "experts": EXPERTS, "router_bias": True} | changes
    return AdapterConfig(**settings)


def arrays() -> dict[str, np.ndarray]:
    """Weights of a decoder by path, none of them zero."""
    model = nnx.eval_shape(lambda: Decoder(Declare(DecoderParam, streams(0)), ARCH, Adapters(adapter())))
    generator = np.random.default_rng(0)
    return {
        path: (0.2 * generator.standard_normal(leaf.shape)).astype(np.float32) for path, leaf in declared(model).items()
    }


@functools.cache
def results(config: AdapterConfig, mesh: MeshConfig) -> dict[str, tuple]:
    """Returns, by routing, (loss, gradients by path, that of the input, tokens by expert) of odd numbers of tokens."""
    model = nnx.eval_shape(lambda: Decoder(Declare(DecoderParam, streams(0)), ARCH, Adapters(config)))
    graph, declarations, devices = nnx.graphdef(model), declared(model), make_mesh(mesh)
    generator = np.random.default_rng(1)
    x, probe = (generator.standard_normal((ROWS, LENGTH, ARCH.width)).astype(np.float32) for _ in range(2))
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    segments = np.ones((ROWS, LENGTH), np.int32)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(leaves, x):
        decoder = nnx.merge(graph, unflatten(leaves))
        y, use = decoder(x, positions, segments, segments=1, key=jax.random.key(5), remat="full")
        return (y * probe).sum() + (use.probs**2).sum(), use.choices.sum(axis=(1, 2))

    def run(biases: np.ndarray) -> tuple:
        leaves = {
            path: jax.device_put(leaf, parameter_sharding(path, declarations[path], devices))
            for path, leaf in (arrays() | {"layers/mlp/router/bias": biases.astype(np.float32)}).items()
        }
        with jax.set_mesh(devices):
            (value, choices), gradients = loss(leaves, jax.device_put(x, batch_sharding(devices)))
        return jax.device_get((value, *gradients, choices))

    return {name: run(biases) for name, biases in ROUTING.items()}


def masked_on_one_device(gradient: str) -> dict[str, tuple]:
    return results(adapter(router_gradient=gradient, expert_path="masked"), MeshConfig(data=1))


def assert_same(config: AdapterConfig, mesh: MeshConfig):
    for routing, expected in masked_on_one_device(config.router_gradient).items():
        value, gradients, dx, choices = results(config, mesh)[routing]
        np.testing.assert_allclose(value, expected[0], rtol=1e-5, err_msg=routing)
        for path, gradient in [*expected[1].items(), ("input", expected[2])]:
            found = dx if path == "input" else gradients[path]
            distance = np.linalg.norm(found - gradient)
            assert distance <= 1e-5 * np.linalg.norm(gradient), f"{routing}: {path}: {distance}"
        np.testing.assert_array_equal(choices, expected[3], err_msg=routing)


def test_the_cases_route_as_their_names_say():
    spread, missing, single = (result[3] for result in masked_on_one_device("none").values())
    assert (spread > 0).sum() > EXPERTS
    assert missing[0, 1] == missing[1, 3] == 0
    assert single[0, 2] == single[1, 0] == ROWS * LENGTH


@pytest.mark.parametrize("gradient", ["none", "straight_through", "gate_scaled"])
def test_grouped_equals_masked(gradient):
    assert_same(adapter(router_gradient=gradient, expert_path="grouped"), MeshConfig(data=1))


@pytest.mark.parametrize(
    ("path", "movement", "gradient", "mesh"),
    [
        pytest.param("masked", "gather", "straight_through", MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
        ("masked", "gather", "dense", MeshConfig(data=1, expert=4, tensor=2)),
        ("masked", "all_to_all", "straight_through", MeshConfig(data=1, fsdp=2, expert=4)),
        ("masked", "all_to_all", "none", MeshConfig(data=2, expert=2, tensor=2)),
        pytest.param("masked", "all_to_all", "gate_scaled", MeshConfig(data=4, expert=2), marks=pytest.mark.slow),
        pytest.param("masked", "all_to_all", "dense", MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
        ("grouped", "gather", "straight_through", MeshConfig(data=2, expert=2, tensor=2)),
        pytest.param("grouped", "auto", "gate_scaled", MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
        ("auto", "auto", "none", MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    ],
)
def test_paths_and_meshes_equal_one_device(path, movement, gradient, mesh):
    assert_same(adapter(router_gradient=gradient, expert_path=path, expert_sharding=movement), mesh)


def test_bytes_of_both_movements_counted_by_hand():
    """E = 3, r = 32 at d = 4096, f = 11008 on 3 devices, 2,048 tokens each: the experts are far smaller."""
    traffic = expert_sharding.traffic(4096, 11008, 96, 2048, 3)
    assert traffic.gather == 2 * 2 * 32 * (4096 + 11008) * 4
    assert traffic.all_to_all == 2 * 2 * 2048 * (4096 + 11008) * 2
    assert traffic.cheaper == "gather"
    assert expert_sharding.traffic(4096, 11008, 8 * 1024, 512, 8).cheaper == "all_to_all"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_gradient": "dense"}, "expert_path grouped sorts tokens by their one expert"),
        ({"expert_sharding": "all_to_all"}, "expert_path grouped needs the experts where the tokens are"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes, message):
    config = Config(
        model=ModelConfig(preset="tiny"),
        adapter=adapter(expert_path="grouped", **changes),
        data=DataConfig(domains=(DomainConfig("a", "a.json"),)),
        train=TrainConfig(steps=1),
        mesh=MeshConfig(expert=2),
    )
    with pytest.raises(UserError, match=message):
        check(config)
