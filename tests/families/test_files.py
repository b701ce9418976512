"""The families' files: read, written back, compared by transformers' own readers, and refused where they are wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mole_jax.config_json import dataclass_from_json, to_json
from mole_jax.errors import UserError
from mole_jax.families import FAMILIES
from mole_jax.image_spec import AnyRes, Grid, Single, Split
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.vision import fraction_buckets
from mole_jax.weights.convert import convert
from mole_jax.weights.formats.hf import write_hf
from mole_jax.weights.hf_checkpoint import HfCheckpoint
from tests.families.golden import FOLDER, NAMES
from tests.weights.runs import leaves_of, trained_run


def module_layout(name: str) -> str:
    """The names of transformers' modules, as a model's own state dict has them."""
    if name.startswith("model.") or name == "lm_head.weight":  # SmolVLM's always are
        return name
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def hub_layout(name: str) -> str:
    """The names of the hub's older files, whose CLIP or SigLIP is within a ``vision_model``."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def copied(name: str, folder: Path, changes: dict[str, dict] | None = None) -> Path:
    """Copies a golden's small files with changed fields, by file and dotted name; None takes a field away."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "processor_config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(FOLDER / name / file, folder / file)
    for file, fields in (changes or {}).items():
        values = json.loads((folder / file).read_text())
        for dotted, value in fields.items():
            *parents, last = dotted.split(".")
            inner = values
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
            if value is None:
                del inner[last]
        (folder / file).write_text(json.dumps(values))
    return folder


def written(name: str, folder: Path) -> HfCheckpoint:
    golden = HfCheckpoint.open(FOLDER / name)
    write_hf(folder, golden.architecture, {path: golden.leaf(path) for path in golden.leaf_shapes()})
    return golden


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_read_and_written_back_is_the_same_in_every_bit(name, tmp_path):
    golden = written(name, tmp_path)
    canonical = FAMILIES[golden.architecture.family].canonical
    before, after = load_file(FOLDER / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    named = before if not name.startswith("llava_qwen") else {canonical(key): one for key, one in before.items()}
    assert named.keys() == after.keys()
    for key, one in named.items():
        assert one.dtype == after[key].dtype
        np.testing.assert_array_equal(one, after[key], err_msg=key)
    assert HfCheckpoint.open(tmp_path).architecture == golden.architecture


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, one in values.items():
        found |= flat(one, f"{prefix}{key}.") if isinstance(one, dict) else {f"{prefix}{key}": one}
    return found


def differing(left: dict, right: dict) -> dict:
    left, right = flat(left), flat(right)
    keys = sorted(left.keys() | right.keys())
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_same_from_what_is_written(name, tmp_path):
    from transformers import AutoConfig, AutoImageProcessor

    written(name, tmp_path)
    configs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (FOLDER / name, tmp_path))
    found = differing(*configs)
    del found["_name_or_path"]
    found.pop("vision_config.projection_dim", None)  # of the contrastive training
    if name == "llava_next_mistral":  # which is a Llama, its window being off
        assert found.pop("text_config.model_type") == ("mistral", "llama")
        for key, off in (("attention_bias", False), ("mlp_bias", False), ("pretraining_tp", 1)):
            assert found.pop(f"text_config.{key}") == (None, off)
    assert found == {}
    processors = (
        AutoImageProcessor.from_pretrained(folder, backend="pil").to_dict() for folder in (FOLDER / name, tmp_path)
    )
    assert differing(*processors) == {}


@pytest.mark.parametrize("name", NAMES)
def test_other_layouts_of_names_read_the_same(name, tmp_path):
    golden = HfCheckpoint.open(FOLDER / name)
    tensors = load_file(FOLDER / name / "model.safetensors")
    for number, layout in enumerate((module_layout, hub_layout)):
        folder = copied(name, tmp_path / str(number))
        renamed = {layout(key): one for key, one in tensors.items()}
        assert renamed.keys() != tensors.keys() or name == "smolvlm", "it has one layout"
        save_file(renamed, folder / "model.safetensors")
        other = HfCheckpoint.open(folder)
        for path in golden.leaf_shapes():
            np.testing.assert_array_equal(other.read(path), golden.read(path), err_msg=path)


@pytest.mark.parametrize("prefix", ["vision_tower.", "vision_tower.vision_model."])
def test_a_pooling_head_that_nothing_uses_is_left_out_with_a_word(prefix, tmp_path):
    """Also under a run: what it stands on is the base's folder."""
    base, tensors = shutil.copytree(FOLDER / "llava_qwen2", tmp_path / "base"), {}
    for file in base.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    head = {
        f"{prefix}head.probe": np.zeros((1, 1, 32), np.float32),
        f"{prefix}head.attention.in_proj_bias": np.ones(96),
    }
    save_file(tensors | head, base / "model.safetensors")
    (base / "model.safetensors.index.json").unlink(missing_ok=True)
    trained_run(tmp_path / "run", base, kind="lora")
    told = re.escape(f"left out: 2 tensors that no feature comes from ({prefix}head.")
    for source in ("base", "run"):
        assert re.search(told, convert(str(tmp_path / source), str(tmp_path / f"{source}_hf"), "hf"))
        written = load_file(tmp_path / f"{source}_hf" / "model.safetensors")
        assert not [name for name in written if ".head." in name]
    for source, to in (("run", "peft"), ("base_hf", "hf")):
        assert "left out" not in convert(str(tmp_path / source), str(tmp_path / f"{source}_{to}"), to)


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_survives_a_run_s_own_json(name):
    arch = HfCheckpoint.open(FOLDER / name).architecture
    values = json.loads(json.dumps(to_json(arch)))
    assert dataclass_from_json(values, LlavaArchitecture, where="x") == arch


def test_tilings_are_those_of_the_processors():
    tilings = {name: HfCheckpoint.open(FOLDER / name).architecture.tiling for name in NAMES}
    resolutions = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
    assert tilings["llava_qwen2"] == Single()
    assert tilings["llava_next_vicuna"] == tilings["llava_next_mistral"] == AnyRes(resolutions)
    onevision = tilings["llava_onevision"]
    assert isinstance(onevision, AnyRes)
    assert (onevision.most, onevision.alone, len(onevision.resolutions)) == (4, True, 16)
    assert tilings["smolvlm"] == Split(168)
    assert tilings["internvl"] == Grid(1, 6)


CONFIG, PROCESSOR = "config.json", "processor_config.json"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("file", "field"),
    [
        (CONFIG, "frobnicate"),
        (CONFIG, "text_config.frobnicate"),
        (CONFIG, "vision_config.frobnicate"),
        (CONFIG, "text_config.quantization_config"),
        (PROCESSOR, "frobnicate"),
        (PROCESSOR, "image_processor.frobnicate"),
    ],
)
def test_an_unknown_field_is_refused_by_its_name(name, file, field, tmp_path):
    folder = copied(name, tmp_path / "folder", {file: {field: 1}})
    with pytest.raises(UserError) as caught:
        HfCheckpoint.open(folder)
    assert str(caught.value).startswith(str(folder / file))
    assert f"'{field.split('.')[-1]}' is not known here" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "field", "value", "message"),
    [
        ("llava_qwen2", CONFIG, "text_config.use_sliding_window", True, "'use_sliding_window' is True, only False"),
        ("llava_qwen2", CONFIG, "text_config.layer_types", ["sliding_attention"], "only 'full_attention' is supported"),
        ("llava_qwen2", CONFIG, "vision_feature_select_strategy", "default", "would drop the first patch"),
        ("llava_qwen2", PROCESSOR, "image_processor.size", {"height": 28, "width": 28}, "sees 56 pixels a side"),
        ("llava_qwen2", PROCESSOR, "patch_size", 16, "'patch_size' is 16, config.json says 14"),
        ("llava_qwen2", PROCESSOR, "image_processor.image_std", [1, 1, 0], "'image_std' is [1, 1, 0], which would div"),
        ("llava_qwen3", CONFIG, "text_config.attention_bias", True, "'attention_bias' is True, only False"),
        ("llava_qwen3", CONFIG, "text_config.is_decoder", True, "'is_decoder' is True, only False"),
        ("llava_next_vicuna", CONFIG, "use_image_newline_parameter", False, "is False, only True is supported"),
        (
            "llava_next_vicuna",
            CONFIG,
            "image_grid_pinpoints",
            [[56, 100]],
            "[56, 100], expected [height, width] in mul",
        ),
        ("llava_next_vicuna", CONFIG, "image_grid_pinpoints", [[56, 56]], "are others than in config.json"),
        ("llava_next_mistral", CONFIG, "multimodal_projector_bias", False, "is False, only True is supported"),
        ("llava_onevision", CONFIG, "vision_aspect_ratio", "square", "'square', only 'anyres_max_N' is supported"),
        ("llava_onevision", CONFIG, "vision_aspect_ratio", "anyres_max_9", "'anyres_max_4', config.json says"),
        ("smolvlm", CONFIG, "scale_factor", 3, "4 x 4 patches do not divide into squares of 3 x 3"),
        ("smolvlm", CONFIG, "text_config.qk_layer_norms", True, "'qk_layer_norms' is True, only False"),
        ("smolvlm", PROCESSOR, "image_processor.do_rescale", False, "'do_rescale' is False, only True"),
        ("smolvlm", PROCESSOR, "image_processor.max_image_size", None, "'max_image_size' is missing"),
        ("internvl", CONFIG, "vision_config.use_mask_token", True, "'use_mask_token' is True, only False"),
        ("internvl", CONFIG, "vision_feature_select_strategy", "full", "'full', only 'default' is supported"),
        ("internvl", CONFIG, "vision_config.image_size", [56, 112], "[56, 112], only squares are supported"),
        ("internvl", CONFIG, "downsample_ratio", 0.3, "'downsample_ratio' is 0.3, expected one over a whole number"),
        ("internvl", PROCESSOR, "image_processor.min_patches", 7, "7 ('min_patches') to 6 ('max_patches') tiles"),
        ("internvl", CONFIG, "model_type", "internvl_chat", "'model_type' is 'internvl_chat', only 'llava' or "),
    ],
)
def test_what_is_known_and_not_supported_is_refused(name, file, field, value, message, tmp_path):
    folder = copied(name, tmp_path / "folder", {file: {field: value}})
    with pytest.raises(UserError) as caught:
        HfCheckpoint.open(folder)
    assert str(folder) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llava_qwen2", "llava_next_vicuna", "llava_onevision", "smolvlm", "internvl"])
def test_a_folder_without_its_processor_is_refused(name, tmp_path):
    folder = copied(name, tmp_path / "folder")
    (folder / PROCESSOR).unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json: no such file.*copy one of them"):
        HfCheckpoint.open(folder)
    content = json.loads((FOLDER / name / PROCESSOR).read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(content["image_processor"]))
    assert HfCheckpoint.open(folder).architecture == HfCheckpoint.open(FOLDER / name).architecture


def test_an_answer_ends_as_the_generation_settings_say(tmp_path):
    """Configs of Qwen's may leave that to them."""
    folder = copied("llava_qwen2", tmp_path / "folder", {CONFIG: {"text_config.eos_token_id": None}})
    assert HfCheckpoint.open(folder).architecture.decoder.eos_ids == (4,)
    (folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"neither its text_config nor generation_config\.json has an 'eos_token_id'"):
        HfCheckpoint.open(folder)


def test_the_hub_s_smolvlm_of_256_million_is_understood(tmp_path):
    """Fields of its config.json that no golden has; sizes are the golden's."""
    config = json.loads((FOLDER / "smolvlm" / CONFIG).read_text())
    old = {
        "model_type": "idefics3",
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "vocab_size": 640,
    }
    text = {
        "_flash_attn_2_enabled": True,
        "is_llama_config": True,
        "neftune_noise_alpha": 0.0,
        "perceiver_config": {"model_type": "vllama3"},
        "pixel_shuffle_factor": 2,
        "qk_layer_norms": False,
        "rope_interleaved": False,
        "use_resampler": False,
    }
    vision = {"max_image_size": {"longest_edge": 56}, "size": {"longest_edge": 168}, "use_base_siglip": False}
    config |= old
    config["text_config"] |= text
    config["vision_config"] |= vision | {"model_type": "idefics3", "tie_word_embeddings": False}
    folder = copied("smolvlm", tmp_path / "folder")
    (folder / CONFIG).write_text(json.dumps(config))
    assert HfCheckpoint.open(folder).architecture == HfCheckpoint.open(FOLDER / "smolvlm").architecture


@pytest.mark.parametrize(("side", "low"), [(4, []), (26, []), (27, []), (32, []), (29, [3, 6, 12, 24])])
def test_positions_by_fraction(side, low):
    """Those of the released towers (26, 27, 32) are the patches in rows; of 29 float32 rounds some one too low.

    Of patch 3 of 29: 3 * fl(1 / 29) is below fl(3 / 29), the boundary of its own bucket.
    """
    buckets = [one - (one in low) for one in range(side)]
    step = np.float32(1) / np.float32(side)
    assert all(np.float32(one) * step < np.float32(one / side) for one in low)
    expected = [row * side + column for row in buckets for column in buckets]
    np.testing.assert_array_equal(fraction_buckets(side), expected)


def test_vectors_around_pictures_have_no_place_in_a_family_s_files():
    from mole_jax.families import write_architecture

    arch = dataclasses.replace(HfCheckpoint.open(FOLDER / "internvl").architecture, image_vectors=True)
    with pytest.raises(UserError, match="no place for learned image start and end vectors"):
        write_architecture(arch)
    with pytest.raises(UserError, match="'llava_two' is no family of models, expected one of llava, llava_next"):
        write_architecture(dataclasses.replace(arch, family="llava_two"))


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("llava_qwen3", "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("internvl", "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("smolvlm", "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight"),
    ],
)
def test_a_lora_goes_out_and_in_through_peft(name, first, tmp_path):
    base = FOLDER / name
    _, leaves = trained_run(tmp_path / "run", base, kind="lora", prompt=None, image_aspect=None)
    convert(str(tmp_path / "run"), str(tmp_path / "peft"), "peft")
    assert first in load_file(tmp_path / "peft" / "adapter_model.safetensors")
    pattern = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    decoder = first.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    assert re.fullmatch(pattern, decoder)
    assert not re.fullmatch(pattern, decoder.replace("language_model", "vision_tower").replace("text_", "vision_"))
    _, again = leaves_of(tmp_path / "peft", base=base)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_what_a_format_has_no_place_for_is_refused(tmp_path):
    settings = {"prompt": None, "image_aspect": None}
    trained_run(tmp_path / "newline", FOLDER / "llava_next_vicuna", kind="lora", **settings)
    with pytest.raises(UserError, match=r"no place for a trained image_newline.*--to mole"):
        convert(str(tmp_path / "newline"), str(tmp_path / "out"), "peft")
    trained_run(tmp_path / "experts", FOLDER / "internvl", kind="mole", **settings)
    with pytest.raises(UserError, match=r"has the decoder of a qwen2, not of a Llama.*--to mole"):
        convert(str(tmp_path / "experts"), str(tmp_path / "out"), "llava_mole")


@pytest.mark.parametrize(
    ("name", "kind", "first"),
    [
        ("llava_qwen3", "qwen3_moe", "language_model.model.layers.0.mlp.experts.2.up_proj.weight"),
        ("internvl", "qwen2_moe", "language_model.model.layers.0.mlp.experts.2.up_proj.weight"),
        ("smolvlm", "mixtral", "model.text_model.layers.0.block_sparse_moe.experts.2.w3.weight"),
    ],
)
def test_experts_of_any_family_are_merged_into_a_mixture_that_transformers_has(name, kind, first, tmp_path):
    """Against transformers: tests/families/test_torch.py."""
    settings = {"kind": "mole", "alpha": 5.0, "rank": 2, "prompt": None, "image_aspect": None}
    _, leaves = trained_run(tmp_path / "run", FOLDER / name, **settings)
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    text = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["num_experts_per_tok"]) == (kind, 1)
    assert text.get("norm_topk_prob", True), "or the expert would be scaled by its probability"
    tensors, path = load_file(tmp_path / "hf" / "model.safetensors"), "decoder/layers/mlp/up_proj/"
    delta = leaves[path + "adapter/a"][0][:, 4:6] @ leaves[path + "adapter/b"][0][4:6]
    np.testing.assert_allclose(tensors[first], (leaves[path + "kernel"][0] + 2.5 * delta).T, rtol=1e-6, atol=1e-6)
    for tensor in (one for one in tensors if "shared_expert.down_proj" in one):
        assert not tensors[tensor].any(), "all tokens would get it"
