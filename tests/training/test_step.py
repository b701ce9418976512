"""The training step: what it changes, what it leaves, and that pieces and devices do not matter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.config import GROUPS, AdapterConfig, OptimizerConfig
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import put_batch
from mole_jax.parameters import flatten, group_of, split_trainable
from mole_jax.training.optimizer import make_tx, peak_learning_rates, scale_by_group, schedule
from mole_jax.training.setup import compiled_step, prepare
from mole_jax.weights.open import open_base, place
from tests import tiny

FOUR_EXPERTS = {"experts": 4}
FINE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def batch(data):
    """Eight packed rows of the real mixture, as host arrays."""
    from mole_jax.data.mixture import Mixture
    from mole_jax.tokenizer import Tokenizer

    config = tiny.config(data)
    arch = open_base(config.model, 0).architecture
    mixture = Mixture.build(
        config.data,
        seed=0,
        tokenizer=Tokenizer.load(tiny.TOKENIZER),
        image=arch.image,
        rows=8,
    )
    arrays = next(mixture).arrays()
    mixture.close()
    return arrays


class Trainer:
    """A state and its compiled step on a mesh."""

    def __init__(self, config):
        self.config = config
        self.mesh = make_mesh(config.mesh)
        source = open_base(config.model, config.seed)
        self.spec = ModelSpec.of(source.architecture, config.adapter)
        leaves = place(self.spec, source, self.mesh, config.train.trainable, "float32", config.seed)
        # B starts at zero, which hides most gradients; a little noise shows them.
        key = jax.random.key(7)
        for path, leaf in leaves.items():
            if path.endswith("adapter/b"):
                leaves[path] = jax.device_put(0.1 * jax.random.normal(key, leaf.shape), leaf.sharding)
        params, self.frozen = split_trainable(leaves, self.spec.declarations, config.train.trainable)
        train_step, self.state = prepare(config, self.spec, self.mesh, params, total_steps=10)
        self.step = compiled_step(train_step, self.state, self.mesh)

    def __call__(self, batch):
        with jax.set_mesh(self.mesh):
            self.state, output = self.step(self.state, self.frozen, put_batch(batch, self.mesh))
        return jax.device_get(output)

    def gradients(self):
        """Clipped gradients of the first step, times 1 - b1: Adam's first moment."""
        (adam,) = (part for part in self.state.opt_state if hasattr(part, "mu"))
        return {path: np.array(leaf) for path, leaf in flatten(adam.mu).items()}

    def params(self):
        return {path: np.array(leaf) for path, leaf in flatten(self.state.params).items()}


@pytest.fixture(scope="module")
def one_device(data, batch):
    """On one device, undivided: metrics and gradients of the first step, metrics of the second."""
    trainer = Trainer(tiny.config(data, adapter=FOUR_EXPERTS))
    return trainer(batch), trainer.gradients(), trainer(batch)


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        ({"data": 1}, 4),
        ({"data": 8}, 1),
        pytest.param({"data": 2, "fsdp": 4}, 1, marks=pytest.mark.slow),
        ({"data": 1, "fsdp": 8}, 1),
        ({"data": 4, "tensor": 2}, 1),
        ({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, 2),
    ],
    ids=lambda value: "_".join(f"{axis}{n}" for axis, n in value.items()) if isinstance(value, dict) else str(value),
)
def test_devices_and_pieces_give_the_update_of_one_large_batch(data, batch, one_device, mesh, accumulation):
    trainer = Trainer(tiny.config(data, adapter=FOUR_EXPERTS, mesh=mesh, train={"accumulation": accumulation}))
    first, gradients, second = one_device
    output = trainer(batch)
    np.testing.assert_allclose(output["total_loss"], first["total_loss"], rtol=1e-5)
    np.testing.assert_allclose(output["grad_norm"], first["grad_norm"], rtol=1e-5)
    np.testing.assert_array_equal(output["sums"].tokens, first["sums"].tokens)
    for path, leaf in trainer.gradients().items():
        scale = np.abs(gradients[path]).max()
        np.testing.assert_allclose(leaf, gradients[path], atol=1e-5 * scale, rtol=1e-5, err_msg=path)
    # Adam divides tiny gradients by their own size, which magnifies rounding, so the update is seen in the next loss.
    np.testing.assert_allclose(trainer(batch)["total_loss"], second["total_loss"], rtol=1e-4)


@pytest.mark.parametrize(
    "adapter",
    [
        {"route_by": "instance", "shared_router": True, "shared_rank": 2, "domain_weight": 0.1},
        pytest.param(
            {"route_by": "instance", "router_input": "standardised", "router_gradient": "dense", "balance_weight": 0.0},
            marks=pytest.mark.slow,
        ),
        pytest.param({"route_by": "domain"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_devices_route_by_instance_and_domain_as_one_does(data, batch, adapter):
    evaluation = {"generate": False}
    one, many = (
        Trainer(tiny.config(data, adapter=FOUR_EXPERTS | adapter, mesh=mesh, evaluation=evaluation))
        for mesh in ({"data": 1}, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    )
    first, output = one(batch), many(batch)
    np.testing.assert_allclose(output["total_loss"], first["total_loss"], rtol=1e-5)
    np.testing.assert_array_equal(output["sums"].use, first["sums"].use)
    expected = one.gradients()
    for path, leaf in many.gradients().items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5 * np.abs(expected[path]).max(), err_msg=path)


def test_pieces_are_weighted_by_their_supervised_tokens(data, batch):
    """Half the rows lose all supervision but one token: unequal pieces still give the large batch's gradient."""
    uneven = {**batch, "loss_mask": batch["loss_mask"].copy()}
    uneven["loss_mask"][1::2] = 0
    uneven["loss_mask"][1, np.flatnonzero(batch["loss_mask"][1])[0]] = 1
    whole, pieces = Trainer(tiny.config(data)), Trainer(tiny.config(data, train={"accumulation": 2}))
    expected, output = whole(uneven), pieces(uneven)
    np.testing.assert_allclose(output["total_loss"], expected["total_loss"], rtol=1e-5)
    np.testing.assert_allclose(output["grad_norm"], expected["grad_norm"], rtol=1e-5)


def test_the_base_stays_and_every_adapter_moves(data, batch):
    trainer = Trainer(tiny.config(data))
    frozen = {path: np.array(leaf) for path, leaf in flatten(trainer.frozen).items()}
    before = trainer.params()
    groups = {group_of(trainer.spec.declarations[path]) for path in before}
    assert groups == {"adapters", "router", "projector"}
    for _ in range(2):
        trainer(batch)
    for path, leaf in flatten(trainer.frozen).items():
        np.testing.assert_array_equal(leaf, frozen[path], err_msg=path)
    for path, leaf in trainer.params().items():
        moved = leaf != before[path]
        if path.endswith("/b") and leaf.ndim == 3:
            assert moved.all(axis=-1).any(axis=-1).all(), f"{path}: a layer did not move"
        assert moved.mean() > 0.5, path


def test_a_batch_that_gives_nan_changes_nothing(data, batch):
    trainer = Trainer(tiny.config(data))
    trainer(batch)
    before, moments = trainer.params(), jax.device_get(trainer.state.opt_state)
    # An image of NaN stands for whatever makes a loss infinite.
    poison = {**batch, "images": np.full(batch["images"].shape, np.nan, np.float32)}
    output = trainer(poison)
    assert not output["finite"]
    assert not np.isfinite(output["total_loss"])
    assert (int(trainer.state.step), int(trainer.state.applied)) == (2, 1)
    for path, leaf in trainer.params().items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.state.opt_state), moments)
    assert trainer(batch)["finite"]


def test_the_state_is_donated_and_the_optimizer_is_sharded_like_its_parameters(data, batch):
    trainer = Trainer(tiny.config(data, mesh={"data": 2, "fsdp": 4}))
    old = trainer.state
    trainer(batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    params = flatten(trainer.state.params)
    cut_in_four = [path for path, leaf in params.items() if leaf.sharding.shard_shape(leaf.shape) != leaf.shape]
    whole = [path for path in params if path not in cut_in_four]
    assert all("router" in path or path.endswith("bias") for path in whole), whole
    (adam,) = (part for part in trainer.state.opt_state if hasattr(part, "mu"))
    for moments in (adam.mu, adam.nu):
        for path, leaf in flatten(moments).items():
            assert leaf.sharding.is_equivalent_to(params[path].sharding, leaf.ndim), path


def test_dropout_follows_seed_and_step(data, batch):
    config = tiny.config(data, adapter={"dropout": 0.5})
    first, again = Trainer(config), Trainer(config)
    losses = [float(first(batch)["total_loss"]) for _ in range(2)]
    assert losses == [float(again(batch)["total_loss"]) for _ in range(2)]
    # The same parameters at another step draw other masks.
    again = Trainer(config)
    again.state = again.state._replace(step=jax.device_put(jnp.int32(5), again.state.step.sharding))
    assert float(again(batch)["total_loss"]) != losses[0]


def test_learning_rates_and_decay_belong_to_their_groups(data):
    config = OptimizerConfig(
        learning_rate=1.0, router_learning_rate=2.0, projector_learning_rate=3.0, base_learning_rate=4.0,
        weight_decay=0.5, clip_norm=None,
    )  # fmt: skip
    assert peak_learning_rates(config) == {
        "adapters": 1.0, "router": 2.0, "projector": 3.0, "vision": 4.0, "decoder": 4.0,
    }  # fmt: skip
    assert set(peak_learning_rates(OptimizerConfig(learning_rate=7.0)).values()) == {7.0}
    spec = ModelSpec.of(open_base(tiny.config(data).model, 0).architecture, AdapterConfig(rank=2))
    params = split_trainable(
        {path: np.ones(p.shape) for path, p in spec.declarations.items()}, spec.declarations, GROUPS
    )[0]
    change = make_tx(config, spec.declarations)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates = flatten(
        scale_by_group(change.update(zero, change.init(params), params)[0], jnp.ones(()), config, spec.declarations)
    )
    # With no gradient only the decay moves: 0.5 times the group's rate for matrices, nothing for the rest.
    rates = peak_learning_rates(config)
    for path, update in updates.items():
        matrix = path.endswith(("kernel", "/a", "/b", "patch_embedding"))
        expected = -0.5 * rates[group_of(spec.declarations[path])] if matrix else 0.0
        np.testing.assert_allclose(update, expected, err_msg=path)


def test_schedule_warms_up_and_ends_at_zero():
    factor = schedule(OptimizerConfig(warmup_fraction=0.1), 100)
    assert [float(factor(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert float(factor(55)) == pytest.approx(0.5, abs=1e-6)  # cosine, half way
    assert float(factor(100)) == pytest.approx(0.0, abs=1e-6)
    assert float(schedule(OptimizerConfig(warmup_fraction=0.0, schedule="constant"), 100)(0)) == 1.0


def test_optimizer_equals_adamw_of_optax(data):
    """With one rate for all, no clipping and no decay, the update is optax.adamw's."""
    import optax

    config = OptimizerConfig(learning_rate=0.01, clip_norm=None)
    spec = ModelSpec.of(open_base(tiny.config(data).model, 0).architecture, AdapterConfig(rank=2))
    params = split_trainable(
        {p: np.ones(d.shape) for p, d in spec.declarations.items()}, spec.declarations, ("adapters",)
    )[0]
    grads = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape)), params)
    ours, theirs = make_tx(config, spec.declarations), optax.adamw(0.01, weight_decay=0.0)
    updates = scale_by_group(ours.update(grads, ours.init(params), params)[0], jnp.ones(()), config, spec.declarations)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **FINE), updates, expected)
