"""A real pretrained model: stories260K (llama2.c), written as a HF folder, must tell its story through our decoder."""

from __future__ import annotations

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.config import AdapterConfig, DecodingConfig, MeshConfig
from mole_jax.model.architecture import DecoderArchitecture, LlavaArchitecture, VisionArchitecture
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import unflatten
from mole_jax.serving.sampler import Prompt, Sampler
from mole_jax.weights.formats.hf import write_hf
from mole_jax.weights.open import open_source, place
from mole_jax.weights.sources import RandomSource


def read_llama2c(file):
    """Returns (architecture, arrays in our names) of llama2.c's legacy layout: seven int32, then float32 in order."""
    content = file.read_bytes()
    width, mlp, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", content[:28])
    assert vocab > 0, "a positive vocabulary means a tied head"
    head_dim, numbers, at = width // heads, np.frombuffer(content, "<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].reshape(shape)

    def halves(weight, count):
        """Rows of a head from interleaved rotary pairs (llama2.c) to two halves (HF)."""
        return weight.reshape(layers, count, head_dim // 2, 2, width).swapaxes(2, 3).reshape(weight.shape)

    leaves = {"decoder/embedding": take(vocab, width), "decoder/layers/attention_norm/scale": take(layers, width)}
    q, k = take(layers, width, width), take(layers, kv_heads * head_dim, width)
    v, o = take(layers, kv_heads * head_dim, width), take(layers, width, width)
    leaves["decoder/layers/mlp_norm/scale"] = take(layers, width)
    gate, down, up = take(layers, mlp, width), take(layers, width, mlp), take(layers, mlp, width)
    leaves["decoder/norm/scale"] = take(width)
    matrices = {
        "attention/q_proj": halves(q, heads),
        "attention/k_proj": halves(k, kv_heads),
        "attention/v_proj": v,
        "attention/o_proj": o,
        "mlp/gate_proj": gate,
        "mlp/up_proj": up,
        "mlp/down_proj": down,
    }
    leaves |= {f"decoder/layers/{name}/kernel": matrix.swapaxes(1, 2) for name, matrix in matrices.items()}
    decoder = DecoderArchitecture(
        vocab, width, mlp, layers, heads, kv_heads, head_dim, max_position=length, tied_head=True
    )
    return decoder, leaves


@pytest.fixture(scope="module")
def stories(shared, tmp_path_factory):
    """(folder of the reference, model spec, mesh, arrays) read back from the HF folder that was written."""
    reference = shared / "models" / "stories260K"
    decoder, leaves = read_llama2c(reference / "stories260K.bin")
    vision = VisionArchitecture(width=16, mlp_width=32, layers=2, heads=2, image_size=28, patch_size=14)
    arch = LlavaArchitecture(vision, decoder, image_token_id=decoder.vocab - 1)
    spec, mesh = ModelSpec.of(arch, AdapterConfig(kind="none")), make_mesh(MeshConfig(data=1))
    made = place(spec, RandomSource(arch, 0), mesh, (), "float32", 0)
    assert {path for path in made if path.startswith("decoder/")} == set(leaves)
    folder = tmp_path_factory.mktemp("stories")
    write_hf(folder, arch, {path: np.asarray(leaf) for path, leaf in made.items()} | leaves, np.float32)
    source = open_source(str(folder))
    return reference, ModelSpec.of(source.architecture, AdapterConfig(kind="none")), mesh, source


def test_logits_and_greedy_story(stories):
    reference, spec, mesh, source = stories
    leaves = unflatten(place(spec, source, mesh, (), "float32", 0))
    expected = np.load(reference / "logits_first64.npz")
    tokens = jnp.asarray(expected["ids"], jnp.int32)[None]
    positions = jnp.arange(tokens.shape[1])[None]
    model = nnx.merge(spec.graph, leaves)
    logits = model(tokens, jnp.zeros((1, 0, 28, 28, 3)), positions, jnp.ones_like(tokens))[0]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=1e-4)

    story = json.loads((reference / "greedy_reference.json").read_text())
    ids = story["greedy_ids"]
    sampler = Sampler(
        spec.graph,
        mesh,
        batch_size=1,
        eos_ids=(2,),
        dtype=jnp.dtype("float32"),
        decoding=DecodingConfig(max_new_tokens=len(ids) - 1),
    )
    prompt = Prompt(np.asarray(ids[:1], np.int32), np.zeros((0, 28, 28, 3), np.uint8))
    assert sampler(leaves, {}, [prompt]) == [ids[1:]]
    # The ids are the text that llama2.c's own test expects.
    assert story["greedy_text"] == (reference / "expected_stdout_200.txt").read_text().rstrip("\n")
