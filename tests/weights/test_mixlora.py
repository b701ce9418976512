"""MoE-PEFT's MixLoRA directory: names by hand, the same logits by its formula, in and out bit for bit, refusals."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.model.architecture import PRESETS
from mole_jax.parameters import unflatten
from mole_jax.weights.convert import convert
from mole_jax.weights.formats.mixlora import check_mixlora
from mole_jax.weights.open import open_source
from tests.weights.mixtral_reference import decoder_logits
from tests.weights.runs import example, leaves_of, logits, trained_run

LAYER = "mixlora.layers.{}."


@pytest.fixture(scope="module")
def golden(goldens):
    return goldens / "tiny_llava_gqa"


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory):
    """A run exported to the folder beside it; returns (spec, all arrays, folder). Tests change copies."""
    folder = tmp_path_factory.mktemp("mixlora")
    spec, leaves = trained_run(folder / "run", golden, kind="mole")
    convert(str(folder / "run"), str(folder / "out"), "mixlora")
    return spec, leaves, folder / "out"


def test_names_shapes_and_settings(exported):
    spec, leaves, folder = exported
    tensors = load_file(folder / "adapter_model.safetensors")
    mlp, attention = "decoder/layers/mlp/", "decoder/layers/attention/"
    for name, value in {
        LAYER.format(2) + "self_attn.v_proj.lora_A.weight": leaves[attention + "v_proj/adapter/a"][2].T,
        LAYER.format(0) + "self_attn.o_proj.lora_B.weight": leaves[attention + "o_proj/adapter/b"][0].T,
        LAYER.format(1) + "mlp.down_proj.experts.2.lora_A.weight": leaves[mlp + "down_proj/adapter/a"][1][:, 6:9].T,
        LAYER.format(1) + "mlp.gate_proj.experts.0.lora_B.weight": leaves[mlp + "gate_proj/adapter/b"][1][:3].T,
        LAYER.format(1) + "mlp.moe_gate.weight": leaves[mlp + "router/kernel"][1].T,
        "multi_modal_projector.linear_2.weight": leaves["projector/linear_2/kernel"].T,
    }.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    layers, experts = spec.arch.decoder.layers, 3
    assert len(tensors) == layers * (4 * 2 + 3 * experts * 2 + 1) + 4
    config = json.loads((folder / "adapter_config.json").read_text())
    # What MoE-PEFT's MixLoraConfig.from_config reads.
    assert {
        key: config[key] for key in ("peft_type", "routing_strategy", "num_experts", "top_k", "r", "lora_alpha")
    } == {
        "peft_type": "MIXLORA",
        "routing_strategy": "mixlora",
        "num_experts": 3,
        "top_k": 1,
        "r": 3,
        "lora_alpha": 6,
    }
    assert sorted(config["target_modules"]) == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )


def test_its_formula_on_the_base_gives_our_logits(exported, golden, tmp_path):
    """Its tensors merged by hand into a Mixtral's, whose reference has the same routing (softmax, top 1, divided)."""
    spec, leaves, folder = exported
    own, scale = load_file(folder / "adapter_model.safetensors"), 6 / 3
    convert(str(folder.parent / "run"), str(tmp_path / "mixtral"), "hf", "float32")
    tensors = load_file(tmp_path / "mixtral" / "model.safetensors")
    kernels = {name: leaves[f"decoder/layers/mlp/{name}/kernel"] for name in ("gate_proj", "up_proj", "down_proj")}

    def delta(prefix):
        return scale * own[prefix + "lora_B.weight"] @ own[prefix + "lora_A.weight"]

    for layer in range(spec.arch.decoder.layers):
        theirs, block = LAYER.format(layer), f"language_model.model.layers.{layer}."
        tensors[block + "block_sparse_moe.gate.weight"] = own[theirs + "mlp.moe_gate.weight"]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            base = leaves[f"decoder/layers/attention/{name}/kernel"][layer].T
            tensors[f"{block}self_attn.{name}.weight"] = base + delta(f"{theirs}self_attn.{name}.")
        for expert in range(3):
            for name, matrix in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                merged = kernels[name][layer].T + delta(f"{theirs}mlp.{name}.experts.{expert}.")
                tensors[f"{block}block_sparse_moe.experts.{expert}.{matrix}.weight"] = merged
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "mixtral/model.safetensors"
    )
    tokens, images = example(spec.arch)
    model = nnx.merge(spec.graph, unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()}))
    x = np.asarray(model.embed(jnp.asarray(tokens), jnp.asarray(images), jnp.dtype("float32")))[0]
    np.testing.assert_allclose(decoder_logits(tmp_path / "mixtral", x), logits(spec, leaves)[0], atol=1e-4, rtol=1e-4)


def test_in_again_bit_for_bit(exported, golden):
    spec, leaves, folder = exported
    again_spec, again = leaves_of(folder)
    assert again_spec.adapter == spec.adapter
    assert again_spec.arch == spec.arch
    assert open_source(str(folder)).prompt == "v1"
    assert again.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_theirs_without_our_header(exported, golden, tmp_path):
    """As MoE-PEFT writes it: no header, no projector, targets as a dict, no base that is here."""
    _, leaves, folder = exported
    tensors = load_file(folder / "adapter_model.safetensors")
    own = {name: value for name, value in tensors.items() if name.startswith("mixlora.")}
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = dict.fromkeys(config["target_modules"], True)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(own, theirs / "adapter_model.safetensors")
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    again_spec, again = leaves_of(theirs, base=golden)
    assert (again_spec.adapter.rank, again_spec.adapter.alpha, again_spec.adapter.experts) == (3, 6.0, 3)
    for path, leaf in leaves.items():
        if "/adapter/" in path or "/router/" in path:
            np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_mistakes_are_told_in_one_line(exported, golden, tmp_path):
    folder = shutil.copytree(exported[2], tmp_path / "changed")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"top_k": 2}, "'top_k' is 2, only 1 is supported"),
        (
            {"routing_strategy": "mixlora-dynamic"},
            "'routing_strategy' is 'mixlora-dynamic', only 'mixlora' or 'mixtral'",
        ),
        ({"expert_lora": {"r": 8}}, r"'expert_lora' is .*, only none is supported"),
        ({"act_fn": "gelu_new"}, "'act_fn' is 'gelu_new', which is not read here"),
        ({"a_setting_of_tomorrow": 1}, "'a_setting_of_tomorrow' is 1, which is not read here"),
        ({"lora_dropout": "some"}, "'lora_dropout' is 'some'"),
        ({"r": 0}, "'r' is 0, expected a whole number of at least 1"),
        ({"target_modules": ["w1"]}, r"'target_modules' is \['w1'\], expected some of q_proj"),
        ({"num_experts": 2}, "says other settings than the tensors' own header"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            open_source(str(folder))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    for header, message in (("{", "is no JSON object"), ('{"prompt": "v9"}', "header: prompt expects one of v1")):
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"mole_jax": header})
        with pytest.raises(UserError, match=message):
            open_source(str(folder))
    tensors["more"] = tensors.pop(LAYER.format(0) + "mlp.moe_gate.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"1 missing: mixlora.layers.0.mlp.moe_gate.weight; 1 unknown: more"):
        open_source(str(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds neither adapter_model.safetensors nor adapter_model.bin"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lora"}, r"has no routed experts \(adapter.kind lora\)"),
        ({"kind": "mole", "router_bias": True}, "has a router with a bias"),
        ({"kind": "mole", "router_gradient": "dense"}, "mixes all experts"),
        ({"kind": "mole", "router_gradient": "gate_scaled"}, "scales experts by their probability"),
        ({"kind": "mole", "alpha": 0.5}, r"has adapter.alpha 0.5, MixLoRA's lora_alpha is a whole number"),
    ],
)
def test_what_mixlora_cannot_say_is_refused(settings, message):
    with pytest.raises(UserError, match=f"somewhere: {message}.*; convert it --to mole instead"):
        check_mixlora(AdapterConfig(**settings), PRESETS["tiny"], where="somewhere")


def test_the_door_refuses_before_it_loads(golden, tmp_path):
    trained_run(tmp_path / "run", golden, kind="lora")
    with pytest.raises(UserError, match=r"has no routed experts \(adapter.kind lora\)"):
        convert(str(tmp_path / "run"), str(tmp_path / "out"), "mixlora")
