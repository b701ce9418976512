"""The released state dict: names by hand, out and in bit for bit, trainables alone, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mole_jax.errors import UserError
from mole_jax.weights.convert import convert
from mole_jax.weights.open import open_source
from tests.weights.runs import leaves_of, logits, trained_run

RELEASED = {"feature_layer": -1, "image_vectors": True}
FILE = "llava_mole.safetensors"
LAYER = "llm_model.base_model.model.model.layers.{}."


@pytest.fixture
def golden(goldens):
    return goldens / "tiny_llava_gqa"


@pytest.fixture
def released(golden, tmp_path):
    """A run with the released settings, exported whole; returns (spec, all arrays, folder)."""
    settings = {"kind": "mole", "router_bias": True, "router_gradient": "none"}
    spec, leaves = trained_run(tmp_path / "run", golden, arch=RELEASED, prompt="llava_mole", **settings)
    convert(str(tmp_path / "run"), str(tmp_path / "out"), "llava_mole", "float32")
    return spec, leaves, tmp_path / "out"


def test_names_and_shapes_are_the_released_ones(released):
    _, leaves, folder = released
    tensors = load_file(folder / FILE)
    mlp = "decoder/layers/mlp/"
    a, b = (leaves[f"{mlp}down_proj/adapter/{side}"] for side in "ab")
    expected = {
        LAYER.format(2) + "self_attn.v_proj.base_layer.weight": leaves["decoder/layers/attention/v_proj/kernel"][2].T,
        LAYER.format(2) + "self_attn.v_proj.lora_A.default.weight": leaves["decoder/layers/attention/v_proj/adapter/a"][
            2
        ].T,
        LAYER.format(0) + "mlp.original_module.gate_proj.weight": leaves[mlp + "gate_proj/kernel"][0].T,
        LAYER.format(1) + "mlp.moe_down.2.lora_A": a[1][:, 6:9].T,
        LAYER.format(1) + "mlp.moe_down.2.lora_B": b[1][6:9].T,
        LAYER.format(1) + "mlp.router.weight": leaves[mlp + "router/kernel"][1].T,
        LAYER.format(1) + "mlp.router.bias": leaves[mlp + "router/bias"][1],
        LAYER.format(1) + "input_layernorm.weight": leaves["decoder/layers/attention_norm/scale"][1],
        "llm_model.base_model.model.model.embed_tokens.weight": leaves["decoder/embedding"],
        "llm_model.base_model.model.model.norm.weight": leaves["decoder/norm/scale"],
        "llm_model.base_model.model.lm_head.weight": leaves["decoder/head/kernel"].T,
        "in_adaptor.visual_start_token": leaves["image_vectors/start"][None, None],
        "in_adaptor.visual_end_token": leaves["image_vectors/end"][None, None],
        "in_adaptor.projector.0.weight": leaves["projector/linear_1/kernel"].T,
        "in_adaptor.projector.2.bias": leaves["projector/linear_2/bias"],
        "in_adaptor.text_embed.weight": leaves["decoder/embedding"],
        "vit.vision_tower.vision_model.post_layernorm.bias": leaves["vision/post_norm/bias"],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    numbers = sum(leaf.size for leaf in leaves.values()) + leaves["decoder/embedding"].size
    assert sum(tensor.size for tensor in tensors.values()) == numbers, "nothing is left out"


def test_out_and_in_is_bit_exact(released, golden, tmp_path):
    spec, leaves, folder = released
    again_spec, again = leaves_of(folder, base=golden)
    assert (again_spec.adapter, again_spec.arch) == (spec.adapter, spec.arch)
    assert open_source(str(folder), base=str(golden)).prompt == "llava_mole"
    convert(str(folder / FILE), str(tmp_path / "again"), "run", "float32", base=str(golden))
    for loaded in (again, leaves_of(tmp_path / "again")[1]):
        assert loaded.keys() == leaves.keys()
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)
    np.testing.assert_array_equal(logits(again_spec, again), logits(spec, leaves))


def test_trainables_alone_as_npz_with_the_released_settings(released, golden, tmp_path):
    """No header, no base weights, no `base_layer`, a bias of zeros, and an embedding of Vicuna's own size."""
    _, leaves, folder = released
    tensors = {
        name.replace(".base_layer.", "."): value
        for name, value in load_file(folder / FILE).items()
        if re.search(r"lora_|router|in_adaptor|self_attn|embed_tokens|lm_head", name)
    }
    tensors |= {name: np.zeros_like(value) for name, value in tensors.items() if name.endswith("router.bias")}
    tensors |= {name: value[:-8] for name, value in tensors.items() if re.search("embed|lm_head", name)}
    np.savez(tmp_path / "released.npz", **tensors)
    spec, again = leaves_of(tmp_path / "released.npz", base=golden)
    adapter = spec.adapter
    assert (adapter.rank, adapter.experts, adapter.alpha) == (3, 3, 6.0)
    assert (adapter.router_gradient, adapter.router_bias) == ("dense", False)
    assert (spec.arch.feature_layer, spec.arch.image_vectors) == (-1, True)
    assert spec.arch.decoder.vocab == leaves["decoder/embedding"].shape[0] - 8
    for path in ("decoder/layers/attention/k_proj/kernel", "decoder/layers/mlp/gate_proj/kernel", "image_vectors/end"):
        np.testing.assert_array_equal(again[path], leaves[path], err_msg=path)
    source = open_source(str(tmp_path / "released.npz"), base=str(golden), alpha=12.0)
    assert (source.adapter.alpha, source.prompt) == (12.0, "llava_mole")


def test_mistakes_are_told_in_one_line(released, golden, tmp_path):
    _, _, folder = released
    whole = load_file(folder / FILE)

    def refused(tensors, match, base=golden):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=match) as caught:
            open_source(str(tmp_path / "bad.safetensors"), base=base and str(base))
        assert "\n" not in str(caught.value)

    expert = LAYER.format(1) + "mlp.moe_up.1.lora_A"
    refused(whole, "give it with --base", base=None)
    with pytest.raises(UserError, match="--alpha 0 is no scale"):
        open_source(str(folder), base=str(golden), alpha=0.0)
    refused({name: one for name, one in whole.items() if name != expert}, f"1 missing: {re.escape(expert)}")
    refused(whole | {LAYER.format(0) + "mlp.moe_up.3.lora_A": whole[expert]}, r"1 unknown: .*moe_up\.3\.lora_A")
    refused(whole | {expert: whole[expert].T.copy()}, r"1 of the wrong shape: .*moe_up\.1\.lora_A is \(64, 3\)")
    refused({"weight": np.ones(3, np.float32)}, "is no LLaVA-MoLE state dict")
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as npz"):
        open_source(str(tmp_path / "bad.npz"), base=str(golden))


@pytest.mark.parametrize(
    ("arch", "settings", "reason"),
    [
        (RELEASED, {"kind": "lora"}, "has no routed experts"),
        (RELEASED, {"kind": "mole", "targets": ("up_proj",)}, "has adapters on some projections only"),
        (RELEASED, {"kind": "mole", "router_gradient": "gate_scaled"}, "scales experts by their probability"),
        ({"feature_layer": -1}, {"kind": "mole"}, "has no image start and end vectors"),
        ({"image_vectors": True}, {"kind": "mole"}, r"takes vision layer -2 \(patch\), the released code -1"),
    ],
)
def test_what_the_released_code_computes_otherwise_is_refused(golden, tmp_path, arch, settings, reason):
    trained_run(tmp_path / "run", golden, arch=arch, **settings)
    with pytest.raises(UserError, match=reason):
        convert(str(tmp_path / "run"), str(tmp_path / "out"), "llava_mole")
