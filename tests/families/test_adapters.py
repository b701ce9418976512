"""LoRA on the vision tower (`adapter.vision_targets`) and its rank-stabilised scale (`adapter.scale`)."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mole_jax.config import VISION_TARGETS, AdapterConfig, MeshConfig
from mole_jax.errors import UserError
from mole_jax.parameters import flatten, unflatten
from mole_jax.weights.convert import convert
from tests.families.conftest import plain_of
from tests.families.golden import FOLDER, batch_of, forward
from tests.weights.runs import leaves_of, trained_run

NOTHING_SAID = {"prompt": None, "image_aspect": None}
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def logits(spec, leaves, case):
    return np.asarray(forward(spec.graph)(unflatten(leaves), *batch_of([case]))[2][0, : case.length])


@pytest.mark.parametrize("name", ["internvl"])
def test_lora_on_the_tower_begins_at_nothing_and_one_step_moves_it(name):
    plain = plain_of(name)
    case = plain.golden.cases["wide"]
    adapter = AdapterConfig(kind="mole", rank=2, alpha=4.0, vision_targets=VISION_TARGETS)
    spec = plain.golden.spec(adapter)
    _, leaves = plain.golden.place(spec)
    run, arguments = forward(spec.graph), batch_of([case])
    for found, base in zip(run(leaves, *arguments), plain.forward(plain.leaves, *arguments), strict=True):
        np.testing.assert_array_equal(found[0, : case.length], base[0, : case.length])
    tower = {path: leaf for path, leaf in flatten(leaves).items() if path.startswith("vision/") and path.endswith("/b")}
    assert len(tower) == len(VISION_TARGETS)

    @jax.jit
    @jax.grad
    def gradient(tower):
        return jax.nn.logsumexp(run(unflatten(flatten(leaves) | tower), *arguments)[2][0, : case.length]).sum()

    for path, one in gradient(tower).items():
        assert (np.abs(one).max(axis=(1, 2)) > 0).all(), path


def test_eight_devices_are_one_with_adapters_everywhere_and_slots_left_over():
    golden = plain_of("internvl").golden
    spec = golden.spec(AdapterConfig(kind="mole", rank=2, alpha=4.0, experts=4, vision_targets=VISION_TARGETS))
    cases = [golden.cases[case] for case in ("wide", "tall", "text", "wide")]
    found = []
    for size in (MeshConfig(data=1), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)):
        mesh, leaves = golden.place(spec, size)
        noise = jax.random.key(3)
        moved = {
            path: jax.device_put(leaf + 0.1 * jax.random.normal(noise, leaf.shape), leaf.sharding)
            for path, leaf in flatten(leaves).items()
            if path.endswith("/adapter/b")
        }
        with jax.set_mesh(mesh):
            run = forward(spec.graph)(unflatten(flatten(leaves) | moved), *batch_of(cases))
        found.append([np.asarray(one) for one in run])
    for one, eight in zip(*found, strict=True):
        for row, case in enumerate(cases):
            np.testing.assert_allclose(eight[row, : case.length], one[row, : case.length], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("smolvlm", ("model.vision_model.encoder.layers.0.", "self_attn.out_proj", "mlp.fc1")),
        ("internvl", ("model.vision_tower.encoder.layer.0.", "attention.projection_layer", "mlp.fc1")),
    ],
)
def test_a_tower_s_lora_goes_through_peft_and_merges(name, modules, tmp_path):
    case, base = plain_of(name).golden.cases["tall"], FOLDER / name
    chosen = {"kind": "lora", "scale": "rslora", "targets": ("q_proj", "up_proj"), "vision_targets": ("o_proj", "fc1")}
    spec, leaves = trained_run(tmp_path / "run", base, **chosen, **NOTHING_SAID)
    convert(str(tmp_path / "run"), str(tmp_path / "peft"), "peft")
    prefix, *names = modules
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for module in names:
        assert f"base_model.model.{prefix}{module}.lora_A.weight" in tensors
        assert re.fullmatch(config["target_modules"], prefix + module)
    assert not re.fullmatch(config["target_modules"], prefix + "mlp.fc2")
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 6, 3)
    again_spec, again = leaves_of(tmp_path / "peft", base=base)
    assert (again_spec.adapter.scale, again_spec.adapter.alpha) == ("rslora", 6.0)
    assert again_spec.adapter.vision_targets == ("o_proj", "fc1")
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    adapted, merged = logits(spec, leaves, case), logits(*leaves_of(tmp_path / "hf"), case)
    np.testing.assert_allclose(merged, adapted, **EXACT)
    assert np.abs(adapted - logits(*leaves_of(base), case)).max() > 1e-2


def test_the_scale_divides_by_the_root_of_the_rank(tmp_path):
    case = plain_of("llava_qwen2").golden.cases["text"]
    spec, leaves = trained_run(tmp_path / "run", FOLDER / "llava_qwen2", kind="mole", scale="rslora", **NOTHING_SAID)
    assert spec.adapter.factor == pytest.approx(6 / math.sqrt(3))
    plain = dataclasses.replace(spec.adapter, scale="standard", alpha=6 * math.sqrt(3))
    as_standard = plain_of("llava_qwen2").golden.spec(plain)
    np.testing.assert_allclose(logits(spec, leaves, case), logits(as_standard, leaves, case), **EXACT)
    with pytest.raises(UserError, match="has the decoder of a qwen2"):
        convert(str(tmp_path / "run"), str(tmp_path / "out"), "llava_mole")


def test_formats_without_a_place_for_them_refuse(tmp_path, goldens):
    for setting, words in (
        ({"scale": "rslora"}, "adapter.scale rslora"),
        ({"vision_targets": ("fc1",)}, "vision_targets"),
    ):
        folder = tmp_path / next(iter(setting))
        trained_run(
            folder, goldens / "tiny_llava", kind="mole", arch={"image_vectors": True, "feature_layer": -1}, **setting
        )
        with pytest.raises(UserError, match=words):
            convert(str(folder), str(tmp_path / "out"), "llava_mole")
        with pytest.raises(UserError, match=words):
            convert(str(folder), str(tmp_path / "out"), "mixlora")
