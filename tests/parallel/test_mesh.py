"""The mesh, and what the table of logical axes makes of the model on it."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mole_jax.adapters import expert_sharding
from mole_jax.adapters.build import Adapters
from mole_jax.config import AdapterConfig, MeshConfig
from mole_jax.errors import UserError
from mole_jax.model.architecture import PRESETS
from mole_jax.model.decoder import Decoder
from mole_jax.model.loss import token_losses
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import check_rows, partition, put_batch, reader
from mole_jax.parameters import Declare, DecoderParam, declared, split_trainable, streams, unflatten

MOLE = AdapterConfig(kind="mole", experts=4, rank=32)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(fsdp=3), r"mesh\.fsdp 3 does not divide the 8 devices there are; set mesh\.fsdp to 2"),
        (MeshConfig(expert=3, tensor=2), r"mesh\.expert 3 does not divide the 4 devices .* set mesh\.expert to 2"),
        (MeshConfig(data=4, fsdp=4), r"needs 16 devices, there are 8"),
        (MeshConfig(data=4, tensor=2, slices=3), r"mesh\.slices 3 does not divide mesh\.data 4.*nearest .* is 2"),
        (MeshConfig(slices=2), r"mesh\.slices is 2, the devices form 1; set mesh\.slices to 1"),
    ],
)
def test_an_impossible_mesh_is_refused_with_the_nearest_possible(mesh, message):
    with pytest.raises(UserError, match=message) as refused:
        make_mesh(mesh)
    assert "\n" not in str(refused.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh needs to know of a device."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_only_the_data_axis_reaches_over_slices():
    devices = [Chip(i, slice_index=i // 8, process_index=i // 4) for i in range(16)]
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, slices=2), devices)
    assert mesh.shape == {"data": 4, "fsdp": 2, "expert": 1, "tensor": 2}
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert [np.unique(block).tolist() for block in slices] == [[0], [0], [1], [1]]


def test_the_low_rank_pair_is_cut_like_the_matrix_beside_it():
    """Megatron's cut, with the adapters' inner rank whole, at every projection of the 7B model."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    leaves = ModelSpec.of(PRESETS["vicuna-7b"], MOLE).abstract(mesh, (), "bfloat16")
    specs = {path: leaf.sharding.spec for path, leaf in leaves.items()}
    mlp, attention = "decoder/layers/mlp", "decoder/layers/attention"
    for name in ("gate_proj", "up_proj"):
        assert specs[f"{mlp}/{name}/kernel"] == P(None, "fsdp", ("tensor",))
        assert specs[f"{mlp}/{name}/adapter/a"] == P(None, "fsdp", "expert")
        assert specs[f"{mlp}/{name}/adapter/b"] == P(None, "expert", ("tensor", "fsdp"))
    assert specs[f"{mlp}/down_proj/kernel"] == P(None, ("tensor",), "fsdp")
    assert specs[f"{mlp}/down_proj/adapter/a"] == P(None, ("tensor", "fsdp"), "expert")
    assert specs[f"{mlp}/down_proj/adapter/b"] == P(None, "expert", "fsdp")
    for name in ("q_proj", "k_proj", "v_proj"):
        assert specs[f"{attention}/{name}/kernel"] == P(None, "fsdp", ("tensor",))
        assert specs[f"{attention}/{name}/adapter/a"] == P(None, "fsdp", None)
        assert specs[f"{attention}/{name}/adapter/b"] == P(None, None, ("tensor", "fsdp"))
    assert specs[f"{attention}/o_proj/adapter/a"] == P(None, ("tensor", "fsdp"), None)
    assert specs["decoder/head/kernel"] == P("fsdp", "tensor")
    assert specs["decoder/embedding"] == P("tensor", "fsdp")
    assert specs["vision/layers/mlp/fc1/kernel"] == P(None, "fsdp", ("tensor",))
    assert specs[f"{mlp}/router/kernel"] == P(None, None, None)


def test_a_mesh_axis_cuts_an_array_once():
    assert partition("batch", "sequence", "mlp") == P(("data", "fsdp", "expert"), None, "tensor")
    assert partition("mlp", "embed") == P("tensor", "fsdp")


@pytest.mark.parametrize(
    ("mesh", "decoder", "adapter", "message"),
    [
        ({"fsdp": 8}, {"width": 36, "head_dim": 8}, {}, r"mesh\.fsdp 8 .* axis 'embed' \(36\) of .*nearest .* is 6"),
        ({"tensor": 8}, {}, {}, r"mesh\.tensor 8 does not divide the 4 attention heads; the nearest that does is 4"),
        ({"tensor": 4}, {}, {}, r"mesh\.tensor 4 does not divide the 2 key-value heads; the nearest that does is 2"),
        ({"expert": 2}, {}, {"experts": 3}, r"mesh\.expert 2 does not divide the 3 experts .*nearest .* is 1"),
        ({"tensor": 2}, {"mlp_width": 65}, {}, r"mesh\.tensor 2 does not divide axis 'mlp' \(65\) of parameter .*"),
    ],
)
def test_a_model_that_the_mesh_does_not_divide_is_refused(mesh, decoder, adapter, message):
    arch = PRESETS["tiny"]
    odd = dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, **decoder))
    spec = ModelSpec.of(odd, dataclasses.replace(MOLE, rank=8, **adapter))
    with pytest.raises(UserError, match=message):
        spec.abstract(make_mesh(MeshConfig(**mesh)), (), "float32")


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"batch_rows 12 does not divide .* = 8 devices .*the nearest that does is 16"):
        check_rows(12, 1, make_mesh(MeshConfig(data=2, fsdp=2, expert=2)))


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)])
def test_a_single_process_reads_and_places_the_whole_batch_in_order(mesh):
    devices = make_mesh(mesh)
    assert reader(devices) == (0, 1)
    rows = np.arange(16 * 3).reshape(16, 3)
    placed = put_batch({"x": rows}, devices)["x"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding.spec == P(("data", "fsdp", "expert"))


def lowered(kind: str, mesh: MeshConfig, vocab: int):
    """Compiles loss and gradient of a decoder's adapters; returns the program's text."""
    arch = dataclasses.replace(PRESETS["tiny"].decoder, vocab=vocab)
    adapter = AdapterConfig(kind=kind, rank=2, experts=2, dropout=0.0)
    model = nnx.eval_shape(lambda: Decoder(Declare(DecoderParam, streams(0)), arch, Adapters(adapter)))
    graph, declarations, devices = nnx.graphdef(model), declared(model), make_mesh(mesh)
    spec = {path: partition(*leaf.get_metadata("axes")) for path, leaf in declarations.items()}
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, "float32", sharding=jax.NamedSharding(devices, spec[path]))
        for path, leaf in declarations.items()
    }
    trainable, frozen = split_trainable(leaves, declarations, ["adapters", "router"])
    tokens = jax.ShapeDtypeStruct((4, 6), "int32", sharding=jax.NamedSharding(devices, partition("batch")))

    def loss(trainable, frozen, tokens):
        decoder = nnx.merge(graph, trainable, frozen)
        x, _ = decoder(decoder.embed(tokens, np.dtype("float32")), tokens, tokens)
        return token_losses(decoder, x, tokens)[0].sum()

    with jax.set_mesh(devices):
        return jax.jit(loss).lower(trainable, frozen, tokens).compile().as_text()


def reduced_in_layers(program: str) -> int:
    """Counts the arrays of (rows, tokens, …) that all-reduces inside the layer loop give back."""
    lines = [line for line in program.splitlines() if "all-reduce(" in line and "while" in line]
    return sum(len(re.findall(r"f32\[4,6,\d+\]", line.split("all-reduce(")[0])) for line in lines)


def test_adapters_add_no_collective_over_tensor():
    mesh = MeshConfig(data=1, tensor=2)
    plain = reduced_in_layers(lowered("none", mesh, 512))
    assert plain == 2  # one after attention, one after the MLP
    assert reduced_in_layers(lowered("mole", mesh, 512)) == plain


def test_no_device_holds_the_logits_of_the_whole_vocabulary():
    assert re.search(r"\[\d+,\d+,1046\]", lowered("none", MeshConfig(data=1), 1046))
    split = lowered("none", MeshConfig(data=1, tensor=2), 1046)
    assert re.search(r"\[\d+,\d+,523\]", split)
    assert not re.search(r"\[\d+,\d+,1046\]", split)


def test_the_log_says_what_moves_and_why():
    """By hand: 3 * 2 * 1 * 48 * (4096 + 11008) * 4 bytes against 3 * 2 * 1 * 4096 * 15104 * 2."""
    text = expert_sharding.explain(dataclasses.replace(MOLE, experts=3), 4096, 11008, 4096, 2, "bfloat16")
    assert "over 2 devices: gather, the fewer bytes" in text
    assert f"{3 * 2 * 48 * 15104 * 4 / 2**20:,.1f} MiB a device when experts" in text
    assert f"{3 * 2 * 4096 * 15104 * 2 / 2**20:,.1f} MiB when tokens" in text
    forced = dataclasses.replace(MOLE, expert_sharding="all_to_all")
    assert "all_to_all, as adapter.expert_sharding says" in expert_sharding.explain(forced, 8, 8, 8, 2, "float32")


def test_the_vision_tower_gathers_weights_and_sums_no_activations_over_fsdp():
    """Once each device summed the activations of all images over fsdp: 61 GB a step of the 7B recipe on 8 devices."""
    arch = PRESETS["small"]
    arch = dataclasses.replace(arch, vision=dataclasses.replace(arch.vision, layers=3))
    devices = make_mesh(MeshConfig(data=1, fsdp=8))
    spec = ModelSpec.of(arch, dataclasses.replace(MOLE, kind="none"))
    leaves = spec.abstract(devices, (), "float32")
    side = arch.vision.image_size
    images = jax.ShapeDtypeStruct(
        (32, side, side, 3), "float32", sharding=jax.NamedSharding(devices, partition("batch"))
    )

    def features(leaves, images):
        return nnx.merge(spec.graph, unflatten(leaves)).image_features(images)

    with jax.set_mesh(devices):
        program = jax.jit(features).lower(leaves, images).compile().as_text()
    assert "all-gather" in program
    assert "all-reduce(" not in program
