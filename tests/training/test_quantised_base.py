"""A run on a quantised base, from its first step to its export: what it says, and what stays in floats."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax import api
from mole_jax.config import DecodingConfig, ModelConfig
from mole_jax.config_check import check
from mole_jax.errors import UserError
from mole_jax.evaluation.checkpoint import evaluate_checkpoint
from mole_jax.files import absolute
from mole_jax.model.quantised import Quantised
from mole_jax.parallel.sharding import put_batch
from mole_jax.serving.assistant import Assistant
from mole_jax.training.loop import train
from mole_jax.training.setup import set_up
from mole_jax.weights.convert import convert
from mole_jax.weights.open import open_source
from mole_jax.weights.run import read_meta
from tests import tiny

KERNEL = "decoder/layers/mlp/up_proj/kernel"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps on a base in int8, of which no file has the weights; returns its config and folder."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny.config(
        tiny.write_data(folder / "data"),
        model={"frozen_dtype": "int8"},
        adapter={"kind": "lora"},
        train={"steps": 2, "trainable": ("adapters", "projector")},
    )
    config = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, tasks=config.evaluation.tasks[:1])
    )
    train(config, absolute(str(folder / "run")))
    return config, folder / "run"


def test_the_checkpoint_names_the_quantisation_and_the_base_is_kept_in_floats(finished):
    _, run = finished
    assert read_meta(absolute(str(run)), 2).quantised == "int8"
    assert open_source(str(run)).quantised == "int8"
    base = open_source(str(run / "base"))
    assert base.quantised is None
    assert base.leaves([KERNEL])[KERNEL].dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize("gone", [False, True])
def test_another_quantisation_does_not_resume(finished, gone):
    """Also where the run's config was lost and only the checkpoint knows."""
    config, run = finished
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, frozen_dtype="nf4"))
    file = run / "config.json"
    kept = file.read_text()
    words = "was trained on a base in int8, model.frozen_dtype nf4" if gone else "holds a run whose model.frozen_dtype"
    try:
        if gone:
            file.unlink()
        with pytest.raises(UserError, match=words) as caught:
            train(other, absolute(str(run)))
    finally:
        file.write_text(kept)
    assert "\n" not in str(caught.value)


def test_evaluation_and_answers_quantise_the_base_the_same_way(finished, tmp_path):
    """Whatever their own settings say: the same scores, of the same weights bit for bit."""
    config, run = finished
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, frozen_dtype="float32"))
    evaluate_checkpoint(other, str(run), absolute(str(tmp_path)))
    name = "eval/step_00000002.json"
    own, again = (json.loads((folder / name).read_text())["tasks"] for folder in (run, tmp_path))
    assert own == again
    model, processor = api.load(str(run), dtype="float32")
    assert isinstance(model.decoder.layers.mlp.up_proj.kernel[...], Quantised)
    # Token by token from the cache as without one: what is decoded is what the quantised model finds likeliest.
    decoding = DecodingConfig(max_new_tokens=4, stop=())
    assistant = Assistant.of(model, processor, decoding, 1)
    prompt = assistant.prompt("Which colour?")
    (made,) = assistant.sampler(assistant.params, {}, [prompt])
    tokens = jnp.asarray([[*prompt.tokens, *made]], jnp.int32)
    whole = model(tokens, jnp.zeros((1, 0, 64, 64, 3), jnp.uint8), jnp.arange(tokens.size)[None], jnp.ones_like(tokens))
    assert made
    assert made == [int(token) for token in whole[0].argmax(-1)[len(prompt.tokens) - 1 : -1]]


def test_what_is_exported_has_the_unquantised_base_and_says_so(finished, tmp_path):
    _, run = finished
    line = convert(str(run), str(tmp_path / "adapters"), "mole")
    assert "trained on a base in int8, of which this has or names the unquantised weights" in line
    assert open_source(str(tmp_path / "adapters")).quantised == "int8"
    line = convert(str(run), str(tmp_path / "whole"), "hf", "float32")
    assert "trained on a base in int8" in line
    source = open_source(str(run))
    leaves = source.leaves([KERNEL, *(KERNEL.replace("kernel", f"adapter/{one}") for one in "ab")])
    w, a, b = (np.asarray(leaf)[0] for leaf in leaves.values())
    scale = source.adapter.alpha / source.adapter.rank
    merged = open_source(str(tmp_path / "whole")).leaves([KERNEL])[KERNEL]
    np.testing.assert_allclose(np.asarray(merged)[0], w + scale * a @ b, rtol=1e-5, atol=1e-7)
    assert "trained on" not in convert(str(run / "base"), str(tmp_path / "base"), "hf")


def test_a_quantised_decoder_cannot_be_trained():
    config = tiny.config(
        absolute("data"), model={"frozen_dtype": "nf4"}, train={"trainable": ("adapters", "router", "decoder")}
    )
    with pytest.raises(UserError, match=r"train.trainable names decoder, which model.frozen_dtype nf4 quantises"):
        check(config)
    assert ModelConfig(frozen_dtype="nf4", compute_dtype="float32").float_dtype == "float32"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Loss and gradients of the quickstart's first batch on its trained base, by type of the frozen weights."""
    folder = tmp_path_factory.mktemp("quickstart")
    data = tiny.write_data(folder / "data")
    arrays = None

    def of(kind: str) -> tuple[float, np.ndarray]:
        nonlocal arrays
        config = tiny.config(
            data,
            model={"preset": None, "base": str(tiny.ROOT / "assets" / "quickstart_base"), "frozen_dtype": kind},
            adapter={"kind": "lora", "rank": 4},
            data={"sequence_length": 256},
            train={"trainable": ("adapters", "projector")},
        )
        run = set_up(config, absolute(str(folder / kind)))
        arrays = arrays or put_batch(next(run.mixture).arrays(), run.mesh)
        # B starts at zero, and with it A's gradient.
        params = jax.tree.map_with_path(
            lambda path, x: x + 1e-3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) if path[-1].key == "b" else x,
            run.state.params,
        )

        def loss(params):
            sums = run.train_step.forward.sums(params, run.frozen, arrays, None)
            return sums.losses.sum() / sums.tokens.sum()

        with jax.set_mesh(run.mesh):
            found, grads = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
        return float(found), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])

    return {kind: of(kind) for kind in ("bfloat16", "int8", "nf4")}


@pytest.mark.parametrize(("kind", "most", "most_gradient"), [("int8", 0.01, 0.1), ("nf4", 0.05, 0.8)])
def test_the_quickstarts_loss_and_gradients_are_near_those_of_the_float_base(quickstart, kind, most, most_gradient):
    (expected, gradient), (found, own) = quickstart["bfloat16"], quickstart[kind]  # the type of its file
    assert 0 < abs(found / expected - 1) < most
    assert np.linalg.norm(own - gradient) < most_gradient * np.linalg.norm(gradient)
