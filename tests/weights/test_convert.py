"""Weights that travel: HF folder to run, run to HF folder, LoRA merged, and what is refused."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mole_jax.config import AdapterConfig, MeshConfig, ModelConfig
from mole_jax.errors import UserError
from mole_jax.families.llava import canonical
from mole_jax.files import absolute
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import group_of, unflatten
from mole_jax.weights import run
from mole_jax.weights.convert import convert
from mole_jax.weights.hf_checkpoint import HfCheckpoint
from mole_jax.weights.open import open_base, open_source, place


@pytest.fixture(params=["tiny_llava", "tiny_llava_gqa"])
def golden(request, goldens):
    return goldens / request.param


def leaves_of(path, trainable=(), dtype="float32"):
    source = open_source(str(path))
    spec = ModelSpec.of(source.architecture, source.adapter)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    return spec, place(spec, source, mesh, trainable, dtype, 0)


def trained_run(folder, base, kind):
    """A run's folder as the trainer leaves it, with random adapters on `base`; returns (spec, all leaves)."""
    source = open_source(str(base))
    adapter = AdapterConfig(kind=kind, rank=3, alpha=6.0)
    spec = ModelSpec.of(source.architecture, adapter)
    groups = ("adapters", "router", "projector")
    leaves = place(spec, source, make_mesh(MeshConfig(data=1)), groups, "float32", 0)
    own = {path: leaf for path, leaf in leaves.items() if group_of(spec.declarations[path]) in groups}
    own = {path: 0.2 * jax.random.normal(jax.random.key(len(path)), leaf.shape) for path, leaf in own.items()}
    meta = run.Meta(
        architecture=source.architecture,
        adapter=adapter,
        trained=groups,
        prompt="v1",
        image_aspect="pad",
        base=str(base),
        base_hash=source.content_hash(),
        seed=0,
    )
    run.write_params(absolute(str(folder)), own, meta)
    return spec, leaves | own


def logits(spec, leaves):
    arch = spec.arch
    tokens = jnp.asarray([[1, *[arch.image_token_id] * arch.image_span, 5, 6, 7]], jnp.int32)
    side = arch.vision.image_size
    images = jax.random.normal(jax.random.key(0), (1, 1, side, side, 3))
    model = nnx.merge(spec.graph, unflatten({path: jnp.asarray(np.asarray(leaf)) for path, leaf in leaves.items()}))
    return model(tokens, images, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))


def test_hf_to_run_and_back_is_bit_exact(golden, tmp_path):
    assert "float32" in convert(str(golden), str(tmp_path / "run"), "run", "float32")
    _, original = leaves_of(golden)
    _, stored = leaves_of(tmp_path / "run")
    assert stored.keys() == original.keys()
    for path, leaf in original.items():
        np.testing.assert_array_equal(stored[path], leaf, err_msg=path)
        assert stored[path].sharding == leaf.sharding

    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    _, again = leaves_of(tmp_path / "hf")
    for path, leaf in original.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    before, after = load_file(golden / "model.safetensors"), load_file(file)
    assert sum(tensor.size for tensor in before.values()) == sum(tensor.size for tensor in after.values())


def test_merged_lora_gives_the_logits_of_base_and_adapter(golden, tmp_path):
    spec, leaves = trained_run(tmp_path / "run", golden, "lora")
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    merged_spec, merged = leaves_of(tmp_path / "hf")
    assert merged_spec.adapter.kind == "none"
    base_spec, base = leaves_of(golden)
    expected = logits(spec, leaves)
    np.testing.assert_allclose(logits(merged_spec, merged), expected, atol=1e-4, rtol=1e-4)
    assert np.abs(logits(base_spec, base) - expected).max() > 0.1, "the adapters matter"


def test_a_run_loads_its_base_and_its_own_arrays(goldens, tmp_path):
    base = goldens / "tiny_llava"
    _, leaves = trained_run(tmp_path / "run", base, "mole")
    _, loaded = leaves_of(tmp_path / "run", trainable=("adapters", "router", "projector"))
    assert loaded.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)


def test_a_run_on_a_run_on_a_hf_folder(goldens, tmp_path):
    """A converted base under a run that trained some of its arrays: each array comes from where it was last written."""
    convert(str(goldens / "tiny_llava"), str(tmp_path / "base"), "run", "float32")
    _, leaves = trained_run(tmp_path / "run", tmp_path / "base", "lora")
    _, loaded = leaves_of(tmp_path / "run", trainable=("adapters", "projector"))
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)
    first, second = (open_source(str(tmp_path / name)).content_hash() for name in ("base", "run"))
    assert first != second
    convert(str(goldens / "tiny_llava"), str(tmp_path / "again"), "run", "float32")
    assert open_source(str(tmp_path / "again")).content_hash() == first, "the hash is of the content"


def test_bfloat16_rounds_once_after_the_merge(goldens, tmp_path):
    _, leaves = trained_run(tmp_path / "run", goldens / "tiny_llava", "lora")
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "bfloat16")
    _, merged = leaves_of(tmp_path / "hf")
    path = "decoder/layers/mlp/up_proj/kernel"
    a, b = (leaves[path.replace("kernel", f"adapter/{name}")] for name in "ab")
    # W itself is bfloat16 already when it is frozen; A and B are float32 until the sum is rounded.
    kernel = leaves[path].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(merged[path], (kernel + 2.0 * (a @ b)).astype(jnp.bfloat16).astype(jnp.float32))


def test_what_cannot_be_is_refused_in_one_line(goldens, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in (goldens / "tiny_llava").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    trained_run(tmp_path / "run", base, "mole")

    for to, flags, reason in (
        ("peft", {}, "PEFT has no LoRA experts routed token by token; convert it --to mole, or fold one with --expert"),
        ("hf", {"expert": 3}, "--expert 3 is not one of its experts 0 to 2"),
        ("mole", {"expert": 0}, "--expert: goes with --to hf or --to peft"),
        ("hf", {"base": str(base)}, "holds no adapters without a base; leave out --base"),
        ("hf", {"alpha": 2.0}, "says its own alpha"),
    ):
        with pytest.raises(UserError, match=reason):
            convert(str(tmp_path / "run"), str(tmp_path / "out"), to, "float32", **flags)
    with pytest.raises(UserError, match="has no experts to choose from"):
        convert(str(base), str(tmp_path / "out"), "hf", "float32", expert=0)
    with pytest.raises(UserError, match="stands on no base that has a name"):
        convert(str(base), str(tmp_path / "out"), "mole")
    with pytest.raises(UserError, match="is a run with mole adapters already"):
        convert(str(tmp_path / "run"), str(tmp_path / "again"), "run", "float32")
    with pytest.raises(UserError, match="carries mole adapters; train from its own base"):
        open_base(ModelConfig(base=str(tmp_path / "run")), 0)
    with pytest.raises(UserError, match=r"already holds a model; choose another --output"):
        convert(str(base), str(base), "hf", "float32")
    with pytest.raises(UserError, match=r"neither a run's folder .* nor a HF folder"):
        open_source(str(tmp_path))

    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config + "\n")
    with pytest.raises(UserError, match=r"was trained on another base than .* now holds"):
        leaves_of(tmp_path / "run")


def test_a_run_of_other_shapes_names_the_array(goldens, tmp_path):
    trained_run(tmp_path / "run", goldens / "tiny_llava", "lora")
    source = open_source(str(tmp_path / "run"))
    wider = ModelSpec.of(source.architecture, AdapterConfig(kind="lora", rank=4))
    with pytest.raises(UserError, match=r"adapter/a has shape \(3, 64, 3\), the config asks for \(3, 64, 4\)"):
        place(wider, source, make_mesh(MeshConfig(data=1)), (), "float32", 0)


@pytest.mark.parametrize("to", ["hf", "run"])
def test_a_disk_that_is_full_is_one_line(goldens, tmp_path, to):
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"out\S*: cannot be written \(File too large\)"):
            convert(str(goldens / "tiny_llava"), str(tmp_path / "out"), to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", ["hf", "run"])
@pytest.mark.parametrize("name", ["file", "file/out", "/proc/out", "x" * 300])
def test_an_output_that_cannot_be_written_is_one_line(goldens, tmp_path, to, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written") as caught:
        convert(str(goldens / "tiny_llava"), str(tmp_path / name), to)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


HALF, BRAIN, SINGLE = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def typed_copy(base: Path, folder: Path, type_of) -> Path:
    """A copy of a HF folder, in the layout that we write, each tensor in the type that `type_of` gives for it."""
    folder.mkdir()
    tensors = {canonical(name): array for name, array in load_file(base / "model.safetensors").items()}
    save_file({n: a.astype(type_of(i, n)) for i, (n, a) in enumerate(tensors.items())}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
def test_types_stay_as_they_came(goldens, tmp_path, dtype):
    base = typed_copy(goldens / "tiny_llava", tmp_path / "base", lambda number, name: dtype)
    given = load_file(base / "model.safetensors")
    assert convert(str(base), str(tmp_path / "run"), "run").endswith(f"numbers as {dtype}")
    for source, to in ((base, "hf"), (tmp_path / "run", "hf2")):
        convert(str(source), str(tmp_path / to), "hf")
        found = load_file(tmp_path / to / "model.safetensors")
        assert found.keys() == given.keys()
        for name, array in given.items():
            assert found[name].dtype == dtype, name
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert json.loads((tmp_path / to / "config.json").read_text())["dtype"] == dtype.name
    convert(str(base), str(tmp_path / "half"), "hf", "float16")
    assert {one.dtype for one in load_file(tmp_path / "half" / "model.safetensors").values()} == {HALF}


def test_mixed_types_stay_tensor_by_tensor(goldens, tmp_path):
    base = typed_copy(goldens / "tiny_llava", tmp_path / "base", lambda number, name: (HALF, BRAIN, SINGLE)[number % 3])
    given = load_file(base / "model.safetensors")
    # Layers of one kind are one array in a run, which takes a type that holds them all.
    convert(str(base), str(tmp_path / "run"), "run")
    convert(str(tmp_path / "run"), str(tmp_path / "back"), "hf")
    said = convert(str(base), str(tmp_path / "hf"), "hf")
    assert all(name in said for name in ("float16", "bfloat16", "float32"))
    found, back = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    for name, array in given.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        np.testing.assert_array_equal(back[name].astype(np.float32), array.astype(np.float32), err_msg=name)
    # Read for training, all of it is in the type that the model asks for, mixed layers or not.
    whole = HfCheckpoint.open(base)
    path = "decoder/layers/attention/q_proj/kernel"
    name = "language_model.model.layers.{}.self_attn.q_proj.weight"
    np.testing.assert_array_equal(whole.read(path), np.stack([given[name.format(i)].T for i in range(3)], dtype=SINGLE))


def test_what_was_trained_takes_the_type_of_its_base_in_a_whole_model(goldens, tmp_path):
    base = typed_copy(goldens / "tiny_llava", tmp_path / "base", lambda number, name: HALF)
    _, leaves = trained_run(tmp_path / "lora", base, "lora")
    trained_run(tmp_path / "mole", base, "mole")
    for kind in ("lora", "mole"):
        convert(str(tmp_path / kind), str(tmp_path / kind / "hf"), "hf")
        assert {one.dtype for one in load_file(tmp_path / kind / "hf" / "model.safetensors").values()} == {HALF}
    merged = HfCheckpoint.open(tmp_path / "lora" / "hf").read("decoder/layers/mlp/up_proj/kernel")
    path = "decoder/layers/mlp/up_proj/"
    expected = leaves[path + "kernel"] + 2.0 * (leaves[path + "adapter/a"] @ leaves[path + "adapter/b"])
    np.testing.assert_array_equal(merged, expected.astype(HALF))
    # Where adapters travel alone, they stay the float32 that was trained, or the type that a file brought.
    convert(str(tmp_path / "lora"), str(tmp_path / "peft"), "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    assert {one.dtype for one in load_file(file).values()} == {SINGLE}
    save_file({name: one.astype(HALF) for name, one in load_file(file).items()}, file)
    for to, name in (("peft", "adapter_model.safetensors"), ("mole", "adapter_model.safetensors")):
        convert(str(tmp_path / "peft"), str(tmp_path / f"half_{to}"), to)
        assert {one.dtype for one in load_file(tmp_path / f"half_{to}" / name).values()} == {HALF}


def test_numbers_that_are_no_weights_are_refused(goldens, tmp_path):
    name = "language_model.model.norm.weight"
    base = typed_copy(goldens / "tiny_llava", tmp_path / "base", lambda _, own: np.int8 if own == name else SINGLE)
    with pytest.raises(UserError, match=rf"1 of a type that is none of float32, .*: {name} is I8"):
        convert(str(base), str(tmp_path / "out"), "hf")
