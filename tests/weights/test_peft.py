"""PEFT folders: out and in bit for bit, names by hand, experts folded into LoRA, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mole_jax.errors import UserError
from mole_jax.weights.convert import convert
from mole_jax.weights.open import open_source
from mole_jax.weights.peft_config import adapter_from_peft
from tests.weights.runs import leaves_of, logits, trained_run
from tests.weights.torch_format import torch_save

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.language_model.layers.{}."


@pytest.fixture
def adapter(goldens, tmp_path):
    """A LoRA run on grouped-query attention, exported; returns (spec, all arrays, folder)."""
    spec, leaves = trained_run(tmp_path / "run", goldens / "tiny_llava_gqa", kind="lora")
    convert(str(tmp_path / "run"), str(tmp_path / "peft"), "peft")
    return spec, leaves, tmp_path / "peft"


def change(folder, tensors=None, **config):
    """Rewrites parts of an adapter folder; a tensor of None goes."""
    values = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(values))
    held = load_file(folder / TENSORS) | (tensors or {})
    save_file({name: value for name, value in held.items() if value is not None}, folder / TENSORS)


def test_names_shapes_and_config_are_pefts(adapter, goldens):
    _, leaves, folder = adapter
    tensors = load_file(folder / TENSORS)
    for path, module in (("attention/k_proj", "self_attn.k_proj"), ("mlp/down_proj", "mlp.down_proj")):
        a, b = (leaves[f"decoder/layers/{path}/adapter/{side}"] for side in "ab")
        for layer in range(3):
            np.testing.assert_array_equal(tensors[LAYER.format(layer) + module + ".lora_A.weight"], a[layer].T)
            np.testing.assert_array_equal(tensors[LAYER.format(layer) + module + ".lora_B.weight"], b[layer].T)
    projector = tensors["base_model.model.model.multi_modal_projector.linear_1.weight"]
    np.testing.assert_array_equal(projector, leaves["projector/linear_1/kernel"].T)
    assert len(tensors) == 3 * 7 * 2 + 4
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert config["modules_to_save"] == ["multi_modal_projector"]
    assert config["base_model_name_or_path"] == str(goldens / "tiny_llava_gqa")
    # PEFT takes a text as a pattern for the whole module name; CLIP has a q_proj too.
    pattern = re.compile(config["target_modules"])
    assert pattern.fullmatch("model.language_model.layers.0.self_attn.q_proj")
    assert pattern.fullmatch("language_model.model.layers.12.mlp.gate_proj")
    assert not pattern.fullmatch("model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert not pattern.fullmatch("model.language_model.layers.0.self_attn.q_projx")


def test_an_original_llava_lora_with_its_projector_apart(adapter, goldens, tmp_path):
    """As LLaVA's own training leaves it: torch's files, no `language_model` in the names, a second file."""
    _, leaves, folder = adapter
    tensors = load_file(folder / TENSORS)
    prefix, projector = "base_model.model.", "base_model.model.model.multi_modal_projector.linear_{}."
    lora = {name.replace("language_model.", ""): value for name, value in tensors.items() if "lora_" in name}
    apart = {
        f"{prefix}model.mm_projector.{theirs}.{part}": tensors[projector.format(ours) + part]
        for ours, theirs in ((1, 0), (2, 2))
        for part in ("weight", "bias")
    }
    assert len(lora) + len(apart) == len(tensors)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    torch_save(theirs / "adapter_model.bin", lora)
    torch_save(theirs / "non_lora_trainables.bin", apart)
    again = leaves_of(theirs, base=goldens / "tiny_llava_gqa")[1]
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_out_and_in_is_bit_exact(adapter, tmp_path):
    spec, leaves, folder = adapter
    again_spec, again = leaves_of(folder)
    assert again_spec.adapter.kind == "lora"
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    # And into a run, whose base stays where it is.
    convert(str(folder), str(tmp_path / "again"), "run")
    source = open_source(str(tmp_path / "again"))
    assert source.trained == ("adapters", "projector")
    run_spec, run = leaves_of(tmp_path / "again")
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(run[path], leaf, err_msg=path)
    np.testing.assert_array_equal(logits(run_spec, run), logits(spec, leaves))


def test_names_of_a_whole_state_dict_are_read(adapter):
    """As DeepSpeed leaves them, with the name that PEFT gave the adapter; two names of one tensor are told."""
    _, leaves, folder = adapter
    tensors = load_file(folder / TENSORS)
    named = {
        re.sub(r"(lora_[AB])", r"\1.default", name).replace("projector.", "projector.modules_to_save.default."): value
        for name, value in tensors.items()
    }
    assert not named.keys() & tensors.keys()
    save_file(named, folder / TENSORS)
    for path, leaf in leaves_of(folder)[1].items():
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)
    first = next(name for name in tensors if "lora_A" in name)
    save_file(named | {first: tensors[first] + 1}, folder / TENSORS)
    with pytest.raises(UserError, match=rf"1 given twice: {re.escape(first)} and |and {re.escape(first)}$"):
        open_source(str(folder))


def test_settings_of_others_are_read(adapter, goldens, tmp_path):
    """Names of transformers 4, some targets, no projector, rank-stabilised scale, base given by the user."""
    _, leaves, folder = adapter
    tensors = {
        name.replace("model.model.language_model.layers", "model.language_model.model.layers"): value
        for name, value in load_file(folder / TENSORS).items()
        if "q_proj" in name or "up_proj" in name
    }
    save_file(tensors, folder / TENSORS)
    change(
        folder,
        target_modules=["q_proj", "up_proj"],
        use_rslora=True,
        base_model_name_or_path=None,
        modules_to_save=None,
    )
    with pytest.raises(UserError, match="does not name the model they stand on; give it with --base"):
        open_source(str(folder))
    spec, again = leaves_of(folder, base=goldens / "tiny_llava_gqa", trainable=("adapters",))
    assert spec.adapter.targets == ("q_proj", "up_proj")
    assert (spec.adapter.scale, spec.adapter.alpha) == ("rslora", 6)
    assert spec.adapter.factor == pytest.approx(6 / math.sqrt(3))
    path = "decoder/layers/mlp/up_proj/adapter/b"
    np.testing.assert_array_equal(again[path], leaves[path])
    assert "decoder/layers/attention/k_proj/adapter/a" not in again
    base = leaves_of(goldens / "tiny_llava_gqa")[1]
    np.testing.assert_array_equal(again["projector/linear_1/kernel"], base["projector/linear_1/kernel"])


def test_mistakes_are_told_in_one_line(adapter):
    _, _, folder = adapter
    name = LAYER.format(1) + "mlp.up_proj.lora_A.weight"
    other = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.qkv.lora_A.weight"

    def refused(match):
        with pytest.raises(UserError, match=match) as caught:
            open_source(str(folder))
        assert "\n" not in str(caught.value)

    config, tensors = (folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes()
    for changes, match in (
        ({"r": 8}, r"says rank \(r\) 8, the tensors have 3"),
        ({"peft_type": "IA3"}, "'peft_type' is 'IA3', only 'LORA' is supported"),
        ({"use_dora": True}, "'use_dora' is True, which is not read here; only plain LoRA is"),
        ({"rank_pattern": {"q_proj": 4}}, "'rank_pattern' is"),
        ({"lora_alpha": "much"}, "'lora_alpha' is 'much'"),
        ({"lora_dropout": "some"}, "'lora_dropout' is 'some'"),
        ({"use_rslora": "yes"}, "'use_rslora' is 'yes'"),
        ({"base_model_name_or_path": ["a"]}, "'base_model_name_or_path' is"),
        ({"revision": "v2"}, "'revision' of its base is 'v2'; download that revision and name its folder with --base"),
        ({"tensors": {name: None}}, f"1 missing: .*{re.escape(name.split('layers.')[1])}"),
        ({"tensors": {other: np.ones((3, 4), np.float32)}}, "1 unknown: .*vision_tower"),
        ({"tensors": {name: np.ones((3, 4), np.float32)}}, r"1 of the wrong shape: .*is \(3, 4\), the base asks for"),
        ({"base_model_name_or_path": "/no/such"}, "no such folder"),
    ):
        change(folder, **changes)
        refused(match)
        (folder / CONFIG).write_bytes(config)
        (folder / TENSORS).write_bytes(tensors)
    (folder / TENSORS).unlink()
    refused("holds neither adapter_model.safetensors nor adapter_model.bin")


def test_one_expert_folded_is_the_model_that_sends_all_tokens_there(goldens, tmp_path):
    spec, leaves = trained_run(
        tmp_path / "run", goldens / "tiny_llava", kind="mole", router_bias=True, router_gradient="none"
    )
    convert(str(tmp_path / "run"), str(tmp_path / "peft"), "peft", expert=1)
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32", expert=1)
    forced = dict(leaves)
    forced["decoder/layers/mlp/router/bias"] = np.full((3, 3), [0, 1e9, 0], np.float32)
    expected = logits(spec, forced)
    assert np.abs(expected - logits(spec, leaves)).max() > 0.1
    for name in ("peft", "hf"):
        np.testing.assert_allclose(logits(*leaves_of(tmp_path / name)), expected, atol=1e-4, rtol=1e-4, err_msg=name)


def _at(values: dict, **changes) -> dict:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | values | changes


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "PiSSA", "olora", "OLoRA", "corda", "lora_ga", "loftq", "something_new", 3]
)
def test_adapters_that_began_as_a_part_of_their_base_are_refused(init):
    with pytest.raises(UserError, match=f"'init_lora_weights' is {init!r}"):
        adapter_from_peft(_at({}, init_lora_weights=init), Path("adapter_config.json"))


@pytest.mark.parametrize("init", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_first_values_that_leave_the_base_alone_are_read(init):
    assert adapter_from_peft(_at({}, init_lora_weights=init), Path("adapter_config.json")).rank == 4


# As PEFT 0.21 writes a plain LoRA: every field of LoraConfig.to_dict().
PLAIN = json.loads("""{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
    "base_model_name_or_path": "base", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
    "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
    "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
    "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.05,
    "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
    "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
    "rank_pattern": {}, "revision": null, "target_modules": ["q_proj"], "target_parameters": null,
    "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false,
    "use_qalora": false, "use_rslora": false, "velora_config": null}""")


def test_a_config_at_pefts_defaults_is_plain():
    assert adapter_from_peft(PLAIN, Path("adapter_config.json")).dropout == 0.05


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [5, 6]),
        ("alpha_pattern", {"k_proj": 100}),
        ("arrow_config", {"top_k": 3}),
        ("bias", "all"),
        ("ensure_weight_tying", True),
        ("fan_in_fan_out", True),
        ("kasa_config", {"beta": 1e-4}),
        ("layer_replication", [[0, 2]]),
        ("layers_to_transform", 3),
        ("lora_bias", True),
        ("megatron_config", {"x": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("rank_pattern", {"q_proj": 8}),
        ("target_parameters", ["experts.down_proj"]),
        ("trainable_token_indices", [3]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_dora", True),
        ("use_qalora", True),
        ("velora_config", {"rank": 1}),
        ("a_setting_of_tomorrow", 0),
    ],
)
def test_any_setting_that_is_not_understood_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"'{key}' is .*, which is not read here") as caught:
        adapter_from_peft(PLAIN | {key: value}, Path("adapter_config.json"))
    assert "\n" not in str(caught.value)


def test_the_revision_of_a_base_does_not_matter_where_the_user_names_it(adapter, goldens):
    change(adapter[2], revision="v2", base_model_name_or_path="some/model")
    assert open_source(str(adapter[2]), base=str(goldens / "tiny_llava_gqa")).adapter.rank == 3
