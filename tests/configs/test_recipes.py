"""The shipped recipes, built whole for eight devices without a byte of weights."""

from __future__ import annotations

import dataclasses
import re
import shlex

import jax
import numpy as np
import pytest

from configs import study
from mole_jax import cli, recipes
from mole_jax.data.load import taken
from mole_jax.data.tiling import pictures
from mole_jax.families import family_of, read_architecture, write_architecture
from mole_jax.model.architecture import preset
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import check_rows
from mole_jax.parameters import flatten, split_trainable
from mole_jax.planning.compile import HUB_PRESETS, abstract_step
from mole_jax.training.setup import compiled_step
from tests.tiny import ROOT

# Trainable numbers from the shapes (method.md, "Sizes"): d 4096, f 11008, 32 layers; d 5120, f 13824, 40 layers.
PROJECTOR = {"7b": 1024 * 4096 + 4096 + 4096 * 4096 + 4096, "13b": 1024 * 5120 + 5120 + 5120 * 5120 + 5120}


def mole(layers, d, heads, kv_heads, f):
    """LoRA r=32 on attention, E=3 experts of r=32 in the MLP, a router of E columns."""
    return layers * (32 * (2 * (d + heads) + 2 * (d + kv_heads)) + 3 * 32 * 3 * (d + f) + 3 * d)


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
    # As their cards on the hub have them: grouped heads (q and o: d, k and v: less), an image newline of LLaVA-NeXT and
    # OneVision, connectors of one matrix (SmolVLM: 16 patches of 768 join) or with a norm (InternVL: 4 of 1024).
    "llava_next_7b_mole": (
        "llava-next-mistral-7b",
        PROJECTOR["7b"] + 4096 + mole(32, 4096, 4096, 1024, 14336),
    ),
    "llava_onevision_0_5b_mole": (
        "llava-onevision-0.5b",
        1152 * 896 + 896 + 896 * 896 + 896 + 896 + mole(24, 896, 896, 128, 4864),
    ),
    "smolvlm_500m_mole": ("smolvlm-500m", 16 * 768 * 960 + mole(32, 960, 960, 320, 2560)),
    "internvl3_1b_mole": (
        "internvl3-1b",
        2 * 4096 + 4096 * 896 + 896 + 896 * 896 + 896 + mole(24, 896, 896, 128, 4864),
    ),
}
SMALL = ("llava_onevision_0_5b_mole", "smolvlm_500m_mole", "internvl3_1b_mole")
"""For one device, or several that each hold the whole model; they take a row each of eight here."""


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_recipe_builds_model_optimizer_and_step_on_eight_devices(name):
    pieces = ["--train.accumulation", "2"] if name in SMALL else []
    config = cli.load_config(str(ROOT / "configs" / f"{name}.py"), pieces)
    size, trained = EXPECTED[name]
    arch = preset(size)
    mesh = make_mesh(config.mesh)
    assert mesh.devices.size == 8
    check_rows(config.train.batch_rows, config.train.accumulation, mesh)
    step = abstract_step(config, arch, mesh)
    trainable, frozen = step.state.params, step.frozen
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == trained
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(trainable))
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(frozen))

    with jax.set_mesh(mesh):
        lowered = compiled_step(step.train_step, step.state, mesh).lower(step.state, step.frozen, step.batch)
    new_state, metrics = lowered.out_info
    assert jax.tree.map(lambda leaf: leaf.shape, new_state.params) == jax.tree.map(lambda leaf: leaf.shape, trainable)
    assert metrics["total_loss"].shape == ()

    if name in SMALL:
        return
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


@pytest.mark.parametrize("name", [*EXPECTED, "llava15_7b_mole_int8"])
def test_a_recipe_works_wherever_it_is_copied(name, tmp_path):
    recipes.copy(name, tmp_path / "mine.py")
    assert cli.load_config(str(tmp_path / "mine.py")) == cli.load_config(name)


@pytest.mark.parametrize("name", sorted(set(HUB_PRESETS.values())))
def test_a_preset_is_what_its_own_files_say(name):
    """What a family writes of it is read as the same: nothing is set that the family's files cannot say."""
    arch = preset(name)
    pixels, own = family_of(arch).processor(arch, "<image>")
    assert read_architecture(write_architecture(arch), own, pixels, where="config.json", folder=".") == arch


@pytest.mark.parametrize(
    ("name", "size", "positions"),
    [
        ("llava-next-mistral-7b", (1000, 1000), 576 + 48 * 48 + 48),
        ("llava-onevision-0.5b", (300, 1200), 729 + 108 * 27 + 108),
        ("smolvlm-500m", (2000, 2000), 17 * 64),
        ("internvl3-1b", (1600, 1200), 13 * 256),
    ],
)
def test_the_largest_picture_fits_a_row_of_its_recipe(name, size, positions):
    """By the families' own rules: tiles times features, and a newline for each row of LLaVA-NeXT's and OneVision's."""
    (recipe,) = [recipe for recipe, (known, _) in EXPECTED.items() if known == name]
    data = cli.load_config(recipe).data
    (layout,) = pictures.layouts(taken(data, preset(name).image), [size], "<image>")
    assert sum(layout.runs) == positions
    assert layout.tiles <= data.tiles_per_row < 2 * layout.tiles
    assert positions + 256 <= data.sequence_length
