"""Kernels in int8 and nf4: against numpy in float64, qwix and the float model; on meshes; what is kept and gathered."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from mole_jax.config import AdapterConfig, Config, DataConfig, DomainConfig, MeshConfig, ModelConfig
from mole_jax.errors import UserError
from mole_jax.model.architecture import preset
from mole_jax.model.objective import Forward
from mole_jax.model.quantised import LEVELS, Quantised, dequantise, product, quantise, tile_of
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import DecoderParam, split_trainable
from mole_jax.weights.open import open_source, place
from mole_jax.weights.sources import RandomSource

KINDS = ("int8", "nf4")
GROUPS = ("adapters", "router", "projector")
ONE = MeshConfig(data=1)
RNG = np.random.default_rng(0)


def kernels(inputs: int, outputs: int = 24) -> np.ndarray:
    """Two layers whose channels differ by factors of hundreds, one channel all zero."""
    values = RNG.normal(size=(2, inputs, outputs)) * np.geomspace(1e-2, 10, outputs)
    values[:, :, 3] = 0
    return values.astype(np.float32)


def floats(quantised: Quantised) -> np.ndarray:
    return np.stack([dequantise(quantised[layer], jnp.dtype("float32")) for layer in range(2)]).astype(np.float64)


def test_int8_is_off_by_half_a_step_at_most():
    wide = kernels(96).astype(np.float64)
    quantised = quantise(jnp.asarray(wide, jnp.float32), "int8")
    step = np.abs(wide).max(axis=1, keepdims=True) / 127.5
    assert (np.abs(floats(quantised) - wide) <= step / 2 * (1 + 1e-4)).all()  # and float32's rounding
    assert quantised.values.dtype == jnp.int8
    # As numpy rounds in float64, but where a value lies between two steps.
    codes = wide / np.where(step == 0, 1, step)
    clear = np.abs(codes - np.floor(codes) - 0.5) > 1e-4
    np.testing.assert_array_equal(quantised.values[clear], np.clip(np.rint(codes), -127, 127)[clear])


@pytest.mark.parametrize("inputs", [256, 352, 24])
def test_nf4_is_the_nearest_level_of_its_tile(inputs):
    wide = kernels(inputs).astype(np.float64)
    quantised = quantise(jnp.asarray(wide, jnp.float32), "nf4")
    tile = tile_of(inputs)
    assert tile == {256: 64, 352: 32, 24: 8}[inputs]
    assert quantised.values.nbytes == wide.size // 2
    tiles = wide.reshape(2, -1, tile, wide.shape[2])
    largest = np.abs(tiles).max(axis=2, keepdims=True)
    scaled = tiles / np.where(largest == 0, 1, largest)
    nearest = np.abs(scaled[..., None] - np.array(LEVELS)).argmin(axis=-1)
    expected = (np.array(LEVELS)[nearest] * largest).reshape(wide.shape)
    # The scale is bfloat16: 8 bits, so off by 2**-8 at most.
    np.testing.assert_allclose(floats(quantised), expected, rtol=2**-8, atol=1e-7)
    gaps = np.abs(floats(quantised).reshape(tiles.shape) - tiles)
    assert (gaps <= largest * (np.diff(LEVELS).max() / 2 + 2**-8)).all()  # half a step, and the scale's own error


def test_nf4_is_unpacked_as_qwix_does_it():
    quantised = quantise(jnp.asarray(kernels(128)), "nf4")[0]
    halves = quantised.values.reshape(2, 32, -1)
    codes = jnp.concatenate([halves & 15, halves >> 4], axis=1).reshape(128, -1)
    theirs = qwix.dequantize(qwix.QArray(codes.astype(jnp.uint4), quantised.scale.astype(jnp.float32), None, "nf4"))
    np.testing.assert_array_equal(dequantise(quantised, jnp.dtype("float32")), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_product_and_its_gradient_are_those_of_the_float_kernel(kind):
    quantised = quantise(jnp.asarray(kernels(128)), kind)[0]
    parameter = DecoderParam(quantised, axes=("embed", "mlp"))
    x, dy = RNG.normal(size=(5, 128)).astype(np.float32), RNG.normal(size=(5, 24)).astype(np.float32)
    y, pull = jax.vjp(lambda x: product(x, parameter), jnp.asarray(x))
    wide = np.asarray(dequantise(quantised, jnp.dtype("float32")), np.float64)
    np.testing.assert_allclose(y, x @ wide, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(pull(jnp.asarray(dy))[0], dy @ wide.T, rtol=1e-5, atol=1e-4)


class Case:
    """A model of the quickstart's shape, its adapters not zero, and a batch without images."""

    def __init__(self, kind: str, mesh: MeshConfig = ONE, remat: str = "none", source=None, adapter: str = "mole"):
        base = preset("quickstart")
        arch = dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, mlp_width=384))
        source = source or RandomSource(arch, 0)
        self.config = Config(
            model=ModelConfig(preset="quickstart", frozen_dtype=kind, compute_dtype="float32", remat=remat),
            adapter=AdapterConfig(kind=adapter, experts=4, rank=4, dropout=0.0),
            data=DataConfig(domains=(DomainConfig("a", "a.json"),), examples_per_row=1),
            mesh=mesh,
        )
        model, self.mesh = self.config.model, make_mesh(mesh)
        self.spec = ModelSpec.of(source.architecture, self.config.adapter)
        groups = GROUPS if adapter == "mole" else ("adapters", "projector")
        leaves = place(self.spec, source, self.mesh, groups, model.float_dtype, 0, model.quantised)
        params, self.frozen = split_trainable(leaves, self.spec.declarations, groups)
        # B starts at zero, and with it A's gradient.
        self.params = jax.tree.map_with_path(
            lambda path, x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) if path[-1].key == "b" else x,
            params,
        )
        rng, shape = np.random.default_rng(1), (8, 32)
        tokens = rng.integers(3, source.architecture.image_token_id, (2, *shape))
        rows = {"tokens": tokens[0], "targets": tokens[1], "positions": np.tile(np.arange(32), (8, 1))}
        ones = {name: np.ones(shape) for name in ("loss_mask", "segment_ids")} | {"domain_ids": np.zeros(shape)}
        self.batch = {name: jnp.asarray(value, jnp.int32) for name, value in {**rows, **ones}.items()}
        self.batch["images"] = jnp.zeros((8, 0, 64, 64, 3), jnp.uint8)

    def loss(self, params, frozen, batch):
        sums = Forward(self.config, self.spec.graph, 1).sums(params, frozen, batch, None)
        return sums.losses.sum() / sums.tokens.sum()

    @property
    def arguments(self):
        return self.params, self.frozen, self.batch

    def step(self):
        """Returns the loss and all gradients as one vector."""
        with jax.set_mesh(self.mesh):
            loss, grads = jax.device_get(jax.jit(jax.value_and_grad(self.loss))(*self.arguments))
        return loss, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def one():
    cases = {kind: Case(kind) for kind in KINDS}
    return {kind: (case.step(), case.frozen) for kind, case in cases.items()}


@pytest.fixture(scope="module")
def tiny_llava(goldens):
    source = open_source(str(goldens / "tiny_llava"))
    return {kind: Case(kind, source=source, adapter="lora").step() for kind in ("float32", *KINDS)}


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        pytest.param("int8", MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
        ("int8", MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
        ("nf4", MeshConfig(data=2, fsdp=2, tensor=2)),
        pytest.param("nf4", MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_computes_what_one_device_does(one, kind, mesh):
    case = Case(kind, mesh)
    (loss, grads), frozen = one[kind]
    jax.tree.map(np.testing.assert_array_equal, case.frozen, frozen)
    found = case.step()
    np.testing.assert_allclose(found[0], loss, rtol=1e-6)
    assert distance(found[1], grads) < 1e-5


@pytest.mark.parametrize(("kind", "letters"), [("int8", "s8"), ("nf4", "u8")])
def test_fsdp_gathers_the_bytes_and_not_the_floats(kind, letters):
    case = Case(kind, MeshConfig(data=1, fsdp=2))
    with jax.set_mesh(case.mesh):
        text = jax.jit(jax.grad(case.loss)).lower(*case.arguments).compile().as_text()
    gathered = re.findall(r"= \(?(\w+)\[([\d,]+)\]\S* all-gather", text)
    inputs = 128 if kind == "int8" else 64
    assert (letters, f"{inputs},384") in gathered
    assert not [shape for dtype, shape in gathered if dtype == "f32" and shape in ("128,384", "384,128", "128,128")]


@pytest.mark.parametrize("remat", ["none", "most", "attention"])
def test_no_float_kernel_is_kept_for_the_backward_pass(remat):
    """A loop that kept them would stack them up: the whole decoder in floats."""
    case = Case("int8", remat=remat)
    text = str(jax.make_jaxpr(jax.grad(case.loss))(*case.arguments))
    assert "i8[4,128,384]" in text
    assert "f32[4,128,384]" not in text
    assert "f32[4,384,128]" not in text


@pytest.mark.parametrize(("kind", "most", "most_gradient"), [("int8", 0.002, 0.03), ("nf4", 0.01, 0.4)])
def test_loss_and_gradients_are_near_those_of_the_float_base(tiny_llava, kind, most, most_gradient):
    """The weights of tiny_llava under LoRA: a router would turn a small difference into another expert."""
    expected, found = tiny_llava["float32"], tiny_llava[kind]
    assert abs(found[0] / expected[0] - 1) < most
    assert 0 < distance(found[1], expected[1]) < most_gradient


def test_kernels_are_loaded_one_at_a_time_in_the_types_of_their_file(goldens):
    asked = []

    @dataclasses.dataclass(frozen=True)
    class Watched(type(source := open_source(str(goldens / "tiny_llava")))):
        def load(self, abstract):
            asked.append(abstract)
            return super().load(abstract)

    watched = Watched(*(getattr(source, field.name) for field in dataclasses.fields(source)))
    spec = ModelSpec.of(source.architecture, AdapterConfig(kind="none"))
    leaves = place(spec, watched, make_mesh(ONE), (), "bfloat16", 0, "int8")
    kernels = [path for path, leaf in leaves.items() if isinstance(leaf, Quantised)]
    assert len(kernels) == 7
    assert [[*one] for one in asked[1:]] == [[path] for path in kernels]
    assert not set(kernels) & set(asked[0])
    for one in asked[1:]:
        assert [leaf.dtype for leaf in one.values()] == ["float32"]
    assert leaves["decoder/head/kernel"].dtype == "bfloat16"
    assert leaves["vision/layers/mlp/fc1/kernel"].dtype == "bfloat16"


def test_a_mesh_that_cuts_through_tiles_is_refused():
    with pytest.raises(UserError, match=r"mesh.tensor 4 cuts through the 2 tiles of 64 inputs of decoder/layers/.*;"):
        Case("nf4", MeshConfig(data=1, fsdp=2, tensor=4))
    Case("int8", MeshConfig(data=1, fsdp=2, tensor=4))
