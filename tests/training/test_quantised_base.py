"""A run on a quantised base, from its first step to its export: what it says, and what stays in floats."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from mole_jax import api
from mole_jax.config import ModelConfig
from mole_jax.config_check import check
from mole_jax.errors import UserError
from mole_jax.evaluation.checkpoint import evaluate_checkpoint
from mole_jax.files import absolute
from mole_jax.model.quantised import Quantised
from mole_jax.training.loop import train
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
    model, _ = api.load(str(run))
    assert isinstance(model.decoder.layers.mlp.up_proj.kernel[...], Quantised)


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
