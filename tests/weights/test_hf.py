"""The Hugging Face format against the files that transformers wrote, and against itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mole_jax.errors import UserError
from mole_jax.families import write_architecture
from mole_jax.families.llava import canonical
from mole_jax.model.architecture import PRESETS, RopeScaling
from mole_jax.weights import hf_checkpoint
from mole_jax.weights.formats.hf import write_hf
from mole_jax.weights.hf_checkpoint import HfCheckpoint, content_hash
from mole_jax.weights.hf_config import architecture_from_hf
from mole_jax.weights.leaf import Leaf
from mole_jax.weights.names import leaf_specs

GOLDENS = ("tiny_llava", "tiny_llava_gqa")


def raw_tensors(file: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file from its bytes, sharing nothing with the reader under test."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[start:stop], types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def middle(name: str) -> str:
    """Layout of transformers 4.5x: everything but the head under ``model.``, with ``vision_model``."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "model." + name


LAYOUTS: dict[str, Callable[[str], str]] = {
    "hub": lambda name: name,
    "middle": middle,
    "fresh": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    "modules": lambda name: middle(name).replace("vision_tower.vision_model.", "vision_tower."),
}


def copy_checkpoint(source: Path, folder: Path, rename: Callable[[str], str] = lambda name: name, **config) -> Path:
    """Writes the golden `source` into `folder` with other key names and config fields."""
    folder.mkdir(exist_ok=True)
    values = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {rename(canonical(name)): value for name, value in raw_tensors(source / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("golden", GOLDENS)
def test_leaves_are_the_files_tensors(goldens: Path, golden: str):
    checkpoint = HfCheckpoint.open(goldens / golden)
    raw = raw_tensors(goldens / golden / "model.safetensors")
    arch = checkpoint.architecture
    # Spelled out by hand, one of each transform, so that the table is not checked with itself.
    q = np.stack(
        [raw[f"language_model.model.layers.{i}.self_attn.q_proj.weight"].T for i in range(arch.decoder.layers)]
    )
    v = np.stack([raw[f"vision_tower.encoder.layers.{i}.self_attn.out_proj.bias"] for i in range(arch.vision.layers)])
    expected = {
        "decoder/layers/attention/q_proj/kernel": q,
        "vision/layers/attention/o_proj/bias": v,
        "vision/patch_embedding": np.einsum("dchw->hwcd", raw["vision_tower.embeddings.patch_embedding.weight"]),
        "vision/pre_norm/scale": raw["vision_tower.pre_layrnorm.weight"],
        "projector/linear_1/kernel": raw["multi_modal_projector.linear_1.weight"].T,
        "decoder/embedding": raw["language_model.model.embed_tokens.weight"],
        "decoder/head/kernel": raw["language_model.lm_head.weight"].T,
    }
    for path, value in expected.items():
        np.testing.assert_array_equal(checkpoint.read(path), value, err_msg=path)
    # And nothing is left out or taken twice: as many numbers, and the same sum of squares.
    leaves = [checkpoint.read(path).astype(np.float64) for path in checkpoint.leaf_shapes()]
    assert sum(leaf.size for leaf in leaves) == sum(value.size for value in raw.values())
    squares = sum(float(np.square(value.astype(np.float64)).sum()) for value in raw.values())
    assert sum(float(np.square(leaf).sum()) for leaf in leaves) == pytest.approx(squares, rel=1e-12)


def test_shapes_are_our_layout(goldens: Path):
    shapes = HfCheckpoint.open(goldens / "tiny_llava_gqa").leaf_shapes()
    assert shapes["decoder/layers/attention/k_proj/kernel"] == (3, 64, 32)
    assert shapes["decoder/layers/mlp/down_proj/kernel"] == (3, 176, 64)
    assert shapes["vision/position_embedding"] == (26, 48)
    assert shapes["vision/patch_embedding"] == (14, 14, 3, 48)
    assert not any(path.startswith("image_vectors") for path in shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(goldens: Path, tmp_path: Path, layout: str):
    golden = HfCheckpoint.open(goldens / "tiny_llava_gqa")
    other = HfCheckpoint.open(copy_checkpoint(goldens / "tiny_llava_gqa", tmp_path / layout, LAYOUTS[layout]))
    for path in golden.leaf_shapes():
        np.testing.assert_array_equal(other.read(path), golden.read(path), err_msg=path)


@pytest.mark.parametrize("piece", [1 << 24, 2500, 1], ids=["one piece", "pieces of rows", "single rows"])
def test_slices_are_slices_of_the_whole(goldens: Path, monkeypatch: pytest.MonkeyPatch, piece: int):
    checkpoint = HfCheckpoint.open(goldens / "tiny_llava_gqa")
    rng = np.random.default_rng(0)
    wholes = {path: checkpoint.read(path) for path in checkpoint.leaf_shapes()}
    monkeypatch.setattr(hf_checkpoint, "_PIECE", piece)  # bytes that a thread reads at a time
    for path, shape in checkpoint.leaf_shapes().items():
        whole = wholes[path]
        np.testing.assert_array_equal(checkpoint.read(path), whole, err_msg=path)
        index = tuple(slice(*sorted(rng.choice(size + 1, 2, replace=False))) for size in shape)
        for one in (index, (slice(None), *index[1:]), (index[0], *(slice(None),) * (len(shape) - 1))):
            part = checkpoint.read(path, one)
            np.testing.assert_array_equal(part, whole[one], err_msg=path)
            assert part.flags.c_contiguous


def test_reads_only_the_tensors_asked_for(goldens: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = HfCheckpoint.open(goldens / "tiny_llava")
    asked = []
    read = checkpoint._tensors.read
    monkeypatch.setattr(
        checkpoint._tensors,
        "read",
        lambda name, index: asked.append((name, read(name, index).shape)) or read(name, index),
    )
    part = checkpoint.read("decoder/layers/mlp/gate_proj/kernel", (slice(1, 2), slice(None), slice(0, 44)))
    assert part.shape == (1, 64, 44)
    assert asked == [("language_model.model.layers.1.mlp.gate_proj.weight", (44, 64))]


def test_loads_straight_into_shardings(goldens: Path):
    import jax

    checkpoint = HfCheckpoint.open(goldens / "tiny_llava")
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    path = "decoder/layers/mlp/gate_proj/kernel"
    array = jax.make_array_from_callback(
        checkpoint.leaf_shapes()[path],
        jax.NamedSharding(mesh, jax.P(None, None, "fsdp")),
        lambda index: checkpoint.read(path, index, np.float32),
    )
    np.testing.assert_array_equal(np.asarray(array), checkpoint.read(path))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 100_000])
def test_round_trip_is_exact(goldens: Path, tmp_path: Path, dtype, shard_bytes: int):
    golden = HfCheckpoint.open(goldens / "tiny_llava_gqa")
    target = tmp_path / "new" / "folder"
    write_hf(target, golden.architecture, stored(golden), dtype, max_shard_bytes=shard_bytes)
    again = HfCheckpoint.open(target)
    assert again.architecture == golden.architecture
    for path in golden.leaf_shapes():
        value = again.read(path)
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, golden.read(path).astype(dtype), err_msg=path)
        np.testing.assert_array_equal(again.read(path, dtype=np.float32), value.astype(np.float32), err_msg=path)
    files = {file.name for file in target.iterdir()}
    assert {"config.json", "generation_config.json", "preprocessor_config.json"} <= files
    shards = sorted(target.glob("model*.safetensors"))
    if shard_bytes == 100_000:
        assert len(shards) > 3
        assert "model.safetensors.index.json" in files
        # No file is over the limit (a tensor that is larger stands alone), all sizes are in the index.
        assert all(
            sum(t.nbytes for t in raw_tensors(s).values()) <= 100_000 or len(raw_tensors(s)) == 1 for s in shards
        )
    else:
        assert [shard.name for shard in shards] == ["model.safetensors"]
    written = {name for shard in shards for name in raw_tensors(shard)}
    assert written == {name for spec in leaf_specs(golden.architecture).values() for name in spec.names}


def test_written_preprocessor_pads_as_llava_trains(goldens: Path, tmp_path: Path):
    golden = HfCheckpoint.open(goldens / "tiny_llava")
    write_hf(tmp_path, golden.architecture, stored(golden))
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    constants = json.loads((goldens / "metrics" / "clip_llava_constants.json").read_text())
    assert settings["do_pad"] is True
    assert settings["size"] == {"shortest_edge": 56}
    np.testing.assert_allclose(settings["image_mean"], constants["image_mean"], atol=1e-7)
    np.testing.assert_allclose(settings["image_std"], constants["image_std"], atol=1e-7)


def test_tied_head_has_no_leaf_and_its_copy_is_ignored(goldens: Path, tmp_path: Path):
    checkpoint = HfCheckpoint.open(copy_checkpoint(goldens / "tiny_llava", tmp_path / "tied", tie_word_embeddings=True))
    assert checkpoint.architecture.decoder.tied_head
    assert "decoder/head/kernel" not in checkpoint.leaf_shapes()


def test_computed_buffers_are_ignored(goldens: Path, tmp_path: Path):
    folder = copy_checkpoint(goldens / "tiny_llava", tmp_path / "c")
    tensors = raw_tensors(folder / "model.safetensors")
    tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(17, dtype=np.int64)[None]
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    HfCheckpoint.open(folder)


def test_content_hash_follows_every_byte(goldens: Path, tmp_path: Path):
    folder = copy_checkpoint(goldens / "tiny_llava", tmp_path / "c")
    first = content_hash(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert content_hash(tmp_path / "copy") == first
    for name, place in (("model.safetensors", -1), ("config.json", 2)):
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1
        (tmp_path / "copy" / name).write_bytes(data)
        assert content_hash(tmp_path / "copy") != first
        shutil.copy(folder / name, tmp_path / "copy" / name)


def stored(checkpoint: HfCheckpoint) -> dict[str, Leaf]:
    return {path: checkpoint.leaf(path) for path in checkpoint.leaf_shapes()}


class TestMistakes:
    """Each is one line that names the file and the thing."""

    def refused(self, folder: Path | str) -> str:
        with pytest.raises(UserError) as caught:
            HfCheckpoint.open(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_keys_are_accounted_for_in_one_message(self, goldens: Path, tmp_path: Path):
        folder = copy_checkpoint(goldens / "tiny_llava", tmp_path / "c")
        tensors = raw_tensors(folder / "model.safetensors")
        for layer in range(3):
            for name in ("q_proj", "k_proj"):
                del tensors[f"language_model.model.layers.{layer}.self_attn.{name}.weight"]
        tensors["language_model.model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)
        tensors["multi_modal_projector.linear_1.bias"] = np.ones(7, np.float32)
        tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"]
        save_file(tensors, folder / "model.safetensors")
        message = self.refused(folder)
        assert "6 missing: language_model.model.layers.0.self_attn.q_proj.weight" in message
        assert message.count("self_attn.q_proj") + message.count("self_attn.k_proj") == 5
        assert "…; 1 unknown: language_model.model.layers.0.self_attn.q_norm.weight" in message
        assert "1 of the wrong shape: multi_modal_projector.linear_1.bias is (7,), the config asks for (64,)" in message
        assert "1 given twice" in message

    def test_missing_and_cut_off_shards(self, goldens: Path, tmp_path: Path):
        golden = HfCheckpoint.open(goldens / "tiny_llava")
        write_hf(tmp_path, golden.architecture, stored(golden), max_shard_bytes=200_000)
        shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
        whole = shard.read_bytes()
        for cut in (whole[:-10], whole[:100], b""):
            shard.write_bytes(cut)
            assert shard.name in self.refused(tmp_path)
        shard.unlink()
        message = self.refused(tmp_path)
        assert shard.name in message
        assert "missing" in message

    def test_no_checkpoint_there(self, goldens: Path, tmp_path: Path):
        assert "no such folder" in self.refused(tmp_path / "nothing")
        assert "config.json: no such file" in self.refused(tmp_path)
        (tmp_path / "config.json").write_text("{")
        assert "cannot be read as JSON" in self.refused(tmp_path)
        shutil.copy(goldens / "tiny_llava" / "config.json", tmp_path)
        assert "holds neither model.safetensors nor" in self.refused(tmp_path)
        (tmp_path / "pytorch_model.bin").touch()
        assert "pytorch_model.bin: no whole file of torch 1.6 or later" in self.refused(tmp_path)

    def test_hub_name_out_of_reach(self, monkeypatch: pytest.MonkeyPatch):
        import huggingface_hub

        def unreachable(*_, **__):
            raise OSError("no connection\nand many more lines")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
        message = self.refused("someone/llava-nowhere")
        assert message.startswith("someone/llava-nowhere: ")
        assert message.endswith("(no connection)")

    def test_leaf_of_another_shape_is_not_written(self, goldens: Path, tmp_path: Path):
        golden = HfCheckpoint.open(goldens / "tiny_llava")
        with pytest.raises(ValueError, match="vision/class_embedding has shape"):
            write_hf(tmp_path, golden.architecture, stored(golden) | {"vision/class_embedding": np.zeros((1,))})

    def test_image_vectors_are_not_written(self, tmp_path: Path):
        with pytest.raises(UserError, match="no place for learned image start"):
            write_hf(tmp_path, dataclasses.replace(PRESETS["tiny"], image_vectors=True), {})

    def test_tokenizer_folder_without_tokenizer(self, goldens: Path, tmp_path: Path):
        golden = HfCheckpoint.open(goldens / "tiny_llava")
        with pytest.raises(UserError, match=r"has neither tokenizer\.model nor tokenizer\.json"):
            write_hf(tmp_path / "out", golden.architecture, stored(golden), tokenizer=goldens)


@pytest.mark.parametrize("name", [name for name, arch in PRESETS.items() if arch.family == "llava"])
def test_architectures_round_trip(name: str):
    arch = PRESETS[name]
    assert architecture_from_hf(json.loads(json.dumps(write_architecture(arch))), where="x") == arch


def test_llama3_rope_in_both_generations():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    text = {"model_type": "llama", "max_position_embeddings": 131072, "num_key_value_heads": 8}
    old = {"model_type": "llava", "text_config": text | {"rope_theta": 5e5, "rope_scaling": scaling}}
    new = {"model_type": "llava", "text_config": text | {"rope_parameters": scaling | {"rope_theta": 5e5}}}
    arch = architecture_from_hf(old, where="x")
    assert arch == architecture_from_hf(new, where="x")
    assert arch.decoder.rope_theta == 5e5
    assert arch.decoder.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert architecture_from_hf(write_architecture(arch), where="x") == arch


def test_missing_fields_are_what_transformers_says():
    """The hub's llava-1.5-7b-hf names only what differs from the defaults."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    hub = {"model_type": "llava", "image_token_index": 32000, "pad_token_id": 0, "text_config": text}
    assert architecture_from_hf(hub, where="x") == PRESETS["vicuna-7b"]
    bare = architecture_from_hf({"model_type": "llava"}, where="x")
    assert (bare.decoder.max_position, bare.decoder.norm_eps, bare.decoder.vocab) == (2048, 1e-6, 32000)
    half = architecture_from_hf({"model_type": "llava", "vision_config": {"patch_size": 16}}, where="x")
    assert (half.vision.width, half.vision.image_size, half.vision.patch_size) == (768, 224, 16)
    mistral = architecture_from_hf({"model_type": "llava", "text_config": {"model_type": "mistral"}}, where="x")
    assert (mistral.decoder.kv_heads, mistral.decoder.max_position) == (8, 4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "paligemma"}, "'model_type' is 'paligemma', only 'llava' or 'llava_next' or "),
        ({"projector_hidden_act": "relu"}, "'projector_hidden_act' is 'relu'"),
        ({"multimodal_projector_bias": False}, "'multimodal_projector_bias' is False"),
        ({"vision_feature_layer": [-2, -5]}, "'vision_feature_layer' is [-2, -5]"),
        ({"vision_feature_layer": -6}, "expected one of the 5 hidden states"),
        ({"text_config": {"model_type": "gemma"}}, "text_config: 'model_type' is 'gemma', only 'llama' or 'mistral'"),
        ({"text_config": {"attention_bias": True}}, "'attention_bias' is True, only False"),
        ({"text_config": {"hidden_act": "gelu"}}, "'hidden_act' is 'gelu', only 'silu'"),
        ({"text_config": {"hidden_size": "64"}}, "'hidden_size' is '64', expected a whole number"),
        ({"text_config": {"num_key_value_heads": 3}}, "32 heads do not divide among 3"),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2}}}, "rope_scaling: 'type' is 'linear'"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_parameters: 'rope_type' is 'yarn'"),
        ({"text_config": {"rope_parameters": {"rope_type": "llama3"}}}, "'factor' is None, expected a number"),
        ({"vision_config": {"model_type": "dinov2"}}, "vision_config: 'model_type' is 'dinov2', only 'clip_vision"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'default' would drop the first patch of a tower"),
        ({"vision_config": 3}, "vision_config: expected an object, found 3"),
    ],
)
def test_unsupported_configs_are_refused_in_one_line(goldens: Path, change: dict, message: str):
    config = json.loads((goldens / "tiny_llava" / "config.json").read_text())
    with pytest.raises(UserError) as caught:
        architecture_from_hf(config | change, where="folder/config.json")
    assert str(caught.value).startswith("folder/config.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class TestAgainstTransformers:
    """transformers' own config classes read what is written here, and mean the same by what is left out."""

    def test_it_reads_the_written_folder(self, goldens: Path, tmp_path: Path):
        transformers = pytest.importorskip("transformers")
        golden = HfCheckpoint.open(goldens / "tiny_llava_gqa")
        write_hf(tmp_path, golden.architecture, stored(golden))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert architecture_from_hf(config.to_dict(), where="x") == golden.architecture
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        assert processor.do_pad
        assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (70, 70)

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"text_config": {"model_type": "mistral"}},
            {"text_config": {"model_type": "llama", "tie_word_embeddings": True, "num_attention_heads": 8}},
            {"vision_config": {"model_type": "clip_vision_model", "patch_size": 16}},
            {"image_token_index": 7, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        ],
    )
    def test_its_defaults_are_ours(self, fields: dict):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.LlavaConfig(**json.loads(json.dumps(fields))).to_dict()
        ours = architecture_from_hf({"model_type": "llava"} | fields, where="x")
        assert architecture_from_hf(theirs, where="x") == ours


def test_all_ids_that_end_an_answer(goldens: Path, tmp_path: Path):
    """Of config.json and generation_config.json, as one number or a list; all of them are written again."""
    folder = copy_checkpoint(goldens / "tiny_llava", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [2, 7, 2]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    found = HfCheckpoint.open(folder)
    assert found.architecture.decoder.eos_ids == (2, 7, 9)
    write_hf(tmp_path / "again", found.architecture, stored(found))
    assert HfCheckpoint.open(tmp_path / "again").architecture == found.architecture
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [2, 7, 9]
    for wrong in ("x", [True], [-1], [2**40], list(range(5_000))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(UserError, match=r"generation_config\.json: 'eos_token_id'"):
            HfCheckpoint.open(folder)
