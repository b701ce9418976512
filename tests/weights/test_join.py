"""A language model and a CLIP, each in its own folder, made into one LLaVA with a new projector."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mole_jax.errors import UserError
from mole_jax.families.llava import canonical
from mole_jax.weights.convert import convert
from mole_jax.weights.formats.llava import open_llava
from mole_jax.weights.hf_checkpoint import resolve
from mole_jax.weights.open import open_source
from tests.weights.runs import leaves_of
from tests.weights.torch_format import torch_save

VOCAB = 320
PROJECTOR = ("linear_1/kernel", "linear_1/bias", "linear_2/kernel", "linear_2/bias")


@pytest.fixture
def parts(goldens, tmp_path):
    """The golden checkpoint's language model and vision tower as their own authors save them; returns both folders."""
    golden = goldens / "tiny_llava"
    config = json.loads((golden / "config.json").read_text())
    language, vision = {}, {"logit_scale": np.zeros((), np.float32), "text_model.norm.bias": np.zeros(3, np.float32)}
    for name, value in load_file(golden / "model.safetensors").items():
        name = canonical(name)
        if name.startswith("language_model."):
            name = name.removeprefix("language_model.")
            language[name] = value[:VOCAB].copy() if "embed_tokens" in name or "lm_head" in name else value
        elif name.startswith("vision_tower."):
            vision[name.removeprefix("vision_tower.")] = value
    text = config["text_config"] | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB}
    clip = {"model_type": "clip", "vision_config": config["vision_config"], "text_config": {}}
    for name, tensors, content in (("vicuna", language, text), ("clip", vision, clip)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    return tmp_path / "vicuna", tmp_path / "clip"


@pytest.mark.parametrize("to", ["hf", "run"])
def test_the_parts_are_there_and_the_projector_is_new(parts, goldens, tmp_path, to):
    vicuna, clip = map(str, parts)
    convert(vicuna, str(tmp_path / "out"), to, "float32", vision=clip)
    spec, ours = leaves_of(tmp_path / "out", trainable=())
    golden = leaves_of(goldens / "tiny_llava", trainable=())[1]
    assert ours.keys() == golden.keys()
    arch = spec.arch
    assert (arch.image_token_id, arch.decoder.vocab) == (VOCAB, 384)
    assert (arch.feature_layer, arch.feature_select) == (-2, "patch"), "LLaVA-1.5's"
    for path, leaf in golden.items():
        if path.startswith("projector/"):
            assert ours[path].shape == leaf.shape
            assert not np.array_equal(ours[path], leaf) or not leaf.any()
        elif path == "decoder/embedding":
            np.testing.assert_array_equal(ours[path][:VOCAB], leaf[:VOCAB])
        elif path == "decoder/head/kernel":
            np.testing.assert_array_equal(ours[path][:, :VOCAB], leaf[:, :VOCAB])
        else:
            np.testing.assert_array_equal(ours[path], leaf, err_msg=path)
    assert np.std(ours["projector/linear_1/kernel"]) > 0
    # Drawn from the seed: made twice, it is the same.
    convert(vicuna, str(tmp_path / "again"), to, "float32", vision=clip)
    again = leaves_of(tmp_path / "again", trainable=())[1]
    for name in PROJECTOR:
        np.testing.assert_array_equal(again[f"projector/{name}"], ours[f"projector/{name}"])


def test_a_mistral_keeps_its_window(parts):
    vicuna, clip = parts
    config = json.loads((vicuna / "config.json").read_text())
    (vicuna / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 48}))
    assert open_source(str(vicuna), vision=str(clip)).architecture.decoder.max_position == 48


def test_mistakes_are_told_in_one_line(parts, goldens):
    vicuna, clip = parts
    for call, message in (
        (
            lambda: open_source(str(vicuna)),
            "is a language model alone; make a LLaVA of it with convert --vision CLIP_FOLDER",
        ),
        (lambda: open_source(str(goldens / "tiny_llava"), vision=str(clip)), "'model_type' is 'llava'; --vision joins"),
        (lambda: open_source(str(vicuna), vision="nowhere"), "nowhere: no such folder"),
        (lambda: open_source(str(vicuna), vision=str(clip), base="x"), "leave out --base and --alpha"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            call()
        assert "\n" not in str(caught.value)
    shutil.copy(clip / "model.safetensors", vicuna / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: .*language_model.model.embed_tokens.weight"):
        open_source(str(vicuna), vision=str(clip))


def test_a_hub_repository_without_safetensors_gives_its_torch_files(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("lmsys/vicuna-7b-v1.5") == tmp_path
    assert ["pytorch_model*.bin"] in asked
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    resolve("llava-hf/llava-1.5-7b-hf")
    assert not any("bin" in pattern for patterns in asked for pattern in patterns)


def test_torch_shards_behind_an_index(parts):
    """Vicuna and CLIP are on the hub as torch's files alone, Vicuna in two with an index."""
    vicuna, clip = parts
    expected = leaves_by_name(vicuna, clip)
    language = load_file(vicuna / "model.safetensors")
    names = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(language)}
    for file in set(names.values()):
        torch_save(vicuna / file, {name: value for name, value in language.items() if names[name] == file})
    (vicuna / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    torch_save(clip / "pytorch_model.bin", load_file(clip / "model.safetensors"))
    for folder in parts:
        (folder / "model.safetensors").unlink()
    found = leaves_by_name(vicuna, clip)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    (vicuna / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"00002-of-00002.bin: missing, though pytorch_model.bin.index.json names it"):
        open_source(str(vicuna), vision=str(clip))


def leaves_by_name(vicuna, clip):
    checkpoint = open_llava(vicuna, str(clip))
    return {path: checkpoint.read(path) for path in checkpoint.leaf_shapes()}
