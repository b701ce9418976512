"""Original LLaVA checkpoints: the same model as Hugging Face's files, a vocabulary grown, a tower apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mole_jax.errors import UserError
from mole_jax.families.llava import canonical
from mole_jax.weights.convert import convert
from mole_jax.weights.formats.llava import open_llava
from mole_jax.weights.open import open_source
from tests.weights.runs import leaves_of

THEIRS = {
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
VOCAB = 320


@pytest.fixture
def original(goldens, tmp_path):
    """The golden checkpoint as LLaVA's own code saves it, without `<image>`; returns (folder, golden folder)."""
    golden = goldens / "tiny_llava"
    config = json.loads((golden / "config.json").read_text())
    text = config["text_config"] | {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    text |= {"vocab_size": VOCAB, "mm_vision_tower": "clip", "mm_projector_type": "mlp2x_gelu"}
    text |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}
    tensors = {}
    for name, value in load_file(golden / "model.safetensors").items():
        name = canonical(name)
        ours = next(prefix for prefix in THEIRS if name.startswith(prefix))
        grown = "embed_tokens" in name or "lm_head" in name
        tensors[THEIRS[ours] + name.removeprefix(ours)] = value[:VOCAB].copy() if grown else value
    folder = tmp_path / "llava"
    (folder / "clip").mkdir(parents=True)
    (folder / "clip" / "config.json").write_text(json.dumps({"vision_config": config["vision_config"]}))
    (folder / "config.json").write_text(json.dumps(text))
    save_file(tensors, folder / "model.safetensors")
    return folder, golden


def check(folder, golden):
    ours, theirs = leaves_of(folder, trainable=())[1], leaves_of(golden, trainable=())[1]
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        if path in ("decoder/embedding", "decoder/head/kernel"):
            ours[path], leaf = (one if path == "decoder/embedding" else one.T for one in (ours[path], leaf))
            assert ours[path].shape == (384, 64)
            mean = np.broadcast_to(leaf[:VOCAB].mean(axis=0), (64, 64))
            np.testing.assert_allclose(ours[path][VOCAB:], mean, atol=1e-7)
            ours[path], leaf = ours[path][:VOCAB], leaf[:VOCAB]
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


def test_the_same_arrays_as_hugging_faces_files(original, tmp_path):
    folder, golden = original
    check(folder, golden)
    arch = open_source(str(folder)).architecture
    assert (arch.image_token_id, arch.decoder.vocab, arch.feature_layer) == (VOCAB, 384, -2)
    assert arch.vision == open_source(str(golden)).architecture.vision
    convert(str(folder), str(tmp_path / "hf"), "hf", "float32")
    check(tmp_path / "hf", golden)
    assert open_source(str(tmp_path / "hf")).architecture == arch


def test_slices_of_a_grown_vocabulary(original):
    checkpoint = open_llava(original[0])
    for path in ("decoder/embedding", "decoder/head/kernel"):
        whole = checkpoint.read(path)
        rows = [slice(0, 100), slice(300, 340), slice(330, 384), slice(320, 320)]
        for one in rows:
            index = (one, slice(3, 9)) if path == "decoder/embedding" else (slice(3, 9), one)
            np.testing.assert_array_equal(checkpoint.read(path, index), whole[index])


def test_a_tower_apart_is_found_and_hashed(original):
    folder, golden = original
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    save_file(
        {name: value for name, value in tensors.items() if not name.startswith(prefix)}, folder / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"clip: holds neither model\.safetensors nor"):
        open_source(str(folder))
    text = {"text_model.final_layer_norm.bias": np.ones(3, np.float32), "logit_scale": np.ones(1, np.float32)}
    save_file(tower | text, folder / "clip" / "model.safetensors")
    check(folder, golden)
    first = open_source(str(folder)).content_hash()
    tower["vision_model.post_layernorm.bias"] += 1
    save_file(tower | text, folder / "clip" / "model.safetensors")
    assert open_source(str(folder)).content_hash() != first


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mm_projector_type", "linear", r"'mm_projector_type' is 'linear', only 'mlp2x_gelu' \(LLaVA-1\.5\)"),
        ("image_aspect_ratio", "anyres", "'image_aspect_ratio' is 'anyres'"),
        ("mm_use_im_start_end", True, "'mm_use_im_start_end' is True"),
        ("mm_vision_tower", "google/siglip", r"'mm_vision_tower' is 'google/siglip', neither a folder nor one of"),
        ("mm_vision_select_feature", "cls", "expected one of patch, cls_patch"),
        ("vocab_size", 1000, r"2 of the wrong shape: .*(embed_tokens|lm_head)\.weight is \(320, 64\)"),
        ("hidden_act", "gelu", "'hidden_act' is 'gelu'"),
    ],
)
def test_what_is_no_llava_15_is_refused_in_one_line(original, field, value, message):
    folder, _ = original
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)
