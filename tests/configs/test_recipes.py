"""The shipped recipes, built whole for eight devices without a byte of weights."""

from __future__ import annotations

import dataclasses
import re
import shlex

import jax
import numpy as np
import pytest

from configs import study
from mole_jax import cli
from mole_jax.model.architecture import preset
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import batch_sharding, check_rows
from mole_jax.parameters import flatten, split_trainable
from mole_jax.training.setup import compiled_step, prepare
from tests.tiny import ROOT

# Trainable numbers from the shapes (method.md, "Sizes"): d 4096, f 11008, 32 layers; d 5120, f 13824, 40 layers.
PROJECTOR = {"7b": 1024 * 4096 + 4096 + 4096 * 4096 + 4096, "13b": 1024 * 5120 + 5120 + 5120 * 5120 + 5120}
EXPECTED = {
    "llava15_7b_pretrain": ("vicuna-7b", PROJECTOR["7b"]),
    "llava15_7b_lora": ("vicuna-7b", PROJECTOR["7b"] + 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))),
    "llava15_7b_mole": (
        "vicuna-7b",
        PROJECTOR["7b"] + 32 * (32 * 4 * 2 * 4096 + 3 * 32 * 3 * (4096 + 11008) + 3 * 4096),
    ),
    "llava15_13b_mole": (
        "vicuna-13b",
        PROJECTOR["13b"] + 40 * (32 * 4 * 2 * 5120 + 3 * 32 * 3 * (5120 + 13824) + 3 * 5120),
    ),
}


def abstract_batch(config, arch, mesh):
    rows, length, side = config.train.batch_rows, config.data.sequence_length, arch.vision.image_size
    place = batch_sharding(mesh)
    names = ("tokens", "targets", "loss_mask", "positions", "segment_ids", "domain_ids")
    batch = {name: jax.ShapeDtypeStruct((rows, length), np.int32, sharding=place) for name in names}
    images = (rows, config.data.tiles_per_row, side, side, 3)
    return {**batch, "images": jax.ShapeDtypeStruct(images, np.uint8, sharding=place)}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_recipe_builds_model_optimizer_and_step_on_eight_devices(name):
    config = cli.load_config(str(ROOT / "configs" / f"{name}.py"))
    size, trained = EXPECTED[name]
    arch = preset(size)
    mesh = make_mesh(config.mesh)
    assert mesh.devices.size == 8
    check_rows(config.train.batch_rows, config.train.accumulation, mesh)
    spec = ModelSpec.of(arch, config.adapter)
    leaves = spec.abstract(mesh, config.train.trainable, config.model.frozen_dtype)
    trainable, frozen = split_trainable(leaves, spec.declarations, config.train.trainable)
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == trained
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(trainable))
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(frozen))

    train_step, state = prepare(config, spec, mesh, trainable, total_steps=1000)
    step = compiled_step(train_step, state, mesh)
    with jax.set_mesh(mesh):
        lowered = step.lower(state, frozen, abstract_batch(config, arch, mesh))
    new_state, metrics = lowered.out_info
    assert jax.tree.map(lambda leaf: leaf.shape, new_state.params) == jax.tree.map(lambda leaf: leaf.shape, trainable)
    assert metrics["total_loss"].shape == ()

    # Frozen weights dominate memory: they must be cut over the devices, not copied to each.
    whole = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    here = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(frozen))
    assert here < 1.01 * whole / 8, {p: leaf.sharding.spec for p, leaf in flatten(frozen).items()}


def test_the_recipe_of_one_device_quantises_and_changes_nothing_else_that_is_learned():
    base, one = (cli.load_config(str(ROOT / "configs" / f"llava15_7b_mole{end}.py")) for end in ("", "_int8"))
    mesh = make_mesh(one.mesh)
    assert mesh.devices.size == 1
    check_rows(one.train.batch_rows, one.train.accumulation, mesh)
    spec, model = ModelSpec.of(preset("vicuna-7b"), one.adapter), one.model
    leaves = spec.abstract(mesh, one.train.trainable, model.float_dtype, model.quantised)
    _, frozen = split_trainable(leaves, spec.declarations, one.train.trainable)
    sizes = [(leaf.dtype, leaf.size) for leaf in jax.tree.leaves(frozen)]
    # method.md, "Sizes": four projections of d x d and three of d x f in each of 32 layers.
    assert sum(size for dtype, size in sizes if dtype == "int8") == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert all(dtype in ("int8", "float32", "bfloat16") for dtype, _ in sizes)
    same = dataclasses.replace(
        one,
        name=base.name,
        model=dataclasses.replace(model, frozen_dtype=base.model.frozen_dtype, remat=base.model.remat),
        train=dataclasses.replace(one.train, accumulation=base.train.accumulation),
        mesh=base.mesh,
    )
    assert same == base


def test_the_embedded_default_names_what_is_there():
    """configs/quickstart*.py load and check, and the base that is trained has the shape of the one that is shipped."""
    for name in ("quickstart", "quickstart_base", "real_mix"):
        assert dataclasses.is_dataclass(cli.load_config(str(ROOT / "configs" / f"{name}.py")))


def test_the_taught_routers_of_the_study_are_one_command_for_the_7b():
    """docs/study.md, "On your own data"."""
    (line,) = re.findall(
        r"mole_jax\.train --config (configs/llava15_7b_mole\.py .*)", (ROOT / "docs/study.md").read_text()
    )
    path, *flags = shlex.split(line)
    config = cli.load_config(str(ROOT / path), flags[2:])
    assert flags[0] == "--workdir"
    chosen = study.TAUGHT
    for field in ("route_by", "balance_weight", "domain_weight"):
        assert getattr(config.adapter, field) == getattr(chosen, field), field
    ratio = study.FAST_ROUTER / study.LEARNING_RATE
    assert config.optimizer.router_learning_rate == pytest.approx(ratio * config.optimizer.learning_rate)
