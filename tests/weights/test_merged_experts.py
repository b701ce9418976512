"""A MoLE as a stock mixture: against the definition (against transformers: test_torch.py), and what is refused."""

from __future__ import annotations

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mole_jax.config import ATTENTION_TARGETS
from mole_jax.errors import UserError
from mole_jax.parameters import unflatten
from mole_jax.weights.convert import convert
from mole_jax.weights.open import open_source
from tests.weights.mixtral_reference import decoder_logits
from tests.weights.runs import example, logits, trained_run

PART = ("q_proj", "gate_proj", "down_proj")
ALL = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")


def embedded(spec, leaves):
    tokens, images = example(spec.arch)
    model = nnx.merge(spec.graph, unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()}))
    return np.asarray(model.embed(jnp.asarray(tokens), jnp.asarray(images), jnp.dtype("float32")))[0]


@pytest.mark.parametrize(
    ("golden", "gradient", "targets", "experts"),
    [
        ("tiny_llava", "none", ALL, 3),
        ("tiny_llava_gqa", "straight_through", PART, 5),
        ("tiny_llava_gqa", "none", ATTENTION_TARGETS, 2),
    ],
)
def test_a_mixtral_by_definition_gives_our_logits(goldens, tmp_path, golden, gradient, targets, experts):
    spec, leaves = trained_run(
        tmp_path / "run", goldens / golden, kind="mole", router_gradient=gradient, targets=targets, experts=experts
    )
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    expected = logits(spec, leaves)[0]
    np.testing.assert_allclose(decoder_logits(tmp_path / "hf", embedded(spec, leaves)), expected, atol=1e-4, rtol=1e-4)


def test_experts_matter_and_are_all_chosen(goldens, tmp_path):
    """The comparison above would pass with any experts if tokens never reached them."""
    spec, leaves = trained_run(tmp_path / "run", goldens / "tiny_llava", kind="mole")
    permuted = dict(leaves)
    kernel = leaves["decoder/layers/mlp/router/kernel"]
    permuted["decoder/layers/mlp/router/kernel"] = kernel[..., [1, 2, 0]]
    assert np.abs(logits(spec, leaves) - logits(spec, permuted)).max() > 0.1
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    gates = np.stack([tensors[f"language_model.model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)])
    np.testing.assert_array_equal(gates, kernel.transpose(0, 2, 1))


def test_every_merged_matrix_by_formula_rounded_once(goldens, tmp_path):
    _, leaves = trained_run(tmp_path / "run", goldens / "tiny_llava", kind="mole", rank=2, alpha=5.0)
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "bfloat16")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for target, matrix in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        path = f"decoder/layers/mlp/{target}/"
        for layer in range(3):
            for expert in range(3):
                a = leaves[path + "adapter/a"][layer][:, 2 * expert : 2 * expert + 2]
                b = leaves[path + "adapter/b"][layer][2 * expert : 2 * expert + 2]
                frozen = leaves[path + "kernel"][layer].astype(ml_dtypes.bfloat16).astype(np.float32)
                name = f"language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
                expected = (frozen + np.float32(2.5) * (a @ b)).T
                assert tensors[name].dtype == ml_dtypes.bfloat16
                # One unit in the last place: the float32 sum may be taken in another order.
                np.testing.assert_allclose(tensors[name].astype(np.float32), expected, rtol=2**-8, atol=1e-7)
    assert not any(".mlp." in name and name.startswith("language_model") for name in tensors)
    text = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    assert (text["num_local_experts"], text["num_experts_per_tok"]) == (3, 1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"router_bias": True}, "its router has a bias"),
        ({"router_gradient": "gate_scaled"}, "scaled by their probability"),
        ({"router_gradient": "dense"}, "it mixes all experts"),
    ],
)
def test_what_is_no_mixtral_is_refused_with_the_reason(goldens, tmp_path, settings, reason):
    trained_run(tmp_path / "run", goldens / "tiny_llava", kind="mole", **settings)
    with pytest.raises(UserError, match=f"is no Mixtral.*{reason}") as caught:
        convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("base", ["tiny_llava", "families/llava_qwen2", "families/llava_qwen3"])
def test_it_is_not_read_back_and_says_what_to_use(goldens, tmp_path, base):
    trained_run(tmp_path / "run", goldens / base, kind="mole")
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    kind = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]["model_type"]
    message = rf"config.json: is a mixture of merged experts \({kind}\).* use the run that it was made of"
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(tmp_path / "hf"))
    assert "\n" not in str(caught.value)
