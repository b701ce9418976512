"""`open_model`: what a config trains, what a checkpoint brings itself, and mistakes that are told before the load."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from mole_jax.config import AdapterConfig, Config, MeshConfig, ModelConfig
from mole_jax.errors import UserError
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.convert import convert
from mole_jax.weights.open import check_image_token, open_base, open_model, open_source
from tests.tiny import TOKENIZER
from tests.weights.runs import leaves_of, trained_run

ONE = MeshConfig(data=1)


def test_training_starts_from_the_base_under_the_configs_adapters(goldens):
    model = ModelConfig(base=str(goldens / "tiny_llava"), tokenizer=TOKENIZER, frozen_dtype="float32")
    config = Config(model=model, adapter=AdapterConfig(kind="lora", rank=2), mesh=ONE, seed=3)
    with pytest.raises(UserError, match=r"model.tokenizer has 487 tokens, the model's embedding 352; use the"):
        open_model(config)
    config = dataclasses.replace(config, model=dataclasses.replace(model, base=TOKENIZER, tokenizer=None))
    opened = open_model(config)
    assert (opened.seed, opened.trainable, opened.spec.adapter) == (3, config.train.trainable, config.adapter)
    leaves = opened.place()
    assert leaves.keys() == opened.spec.declarations.keys()
    assert leaves["decoder/layers/mlp/up_proj/adapter/a"].dtype == "float32"


def test_a_checkpoint_brings_adapters_groups_and_seed(tmp_path):
    spec, _ = trained_run(tmp_path / "run", TOKENIZER, kind="mole", router_bias=True)
    other = Config(model=ModelConfig(tokenizer=TOKENIZER), adapter=AdapterConfig(rank=7), mesh=ONE, seed=5)
    opened = open_model(other, open_source(str(tmp_path / "run")))
    assert opened.spec.adapter == spec.adapter
    assert (opened.trainable, opened.seed) == (("adapters", "router", "projector"), 0)
    with pytest.raises(
        UserError, match=r"model.tokenizer is not set and there is no tokenizer.model or tokenizer.json"
    ):
        open_model(Config(mesh=ONE), open_source(str(tmp_path / "run")))


def test_a_base_under_changes_of_the_config_is_the_same_base(goldens, tmp_path):
    """A run on a run's folder that takes its features from another layer: afterwards, its base is still its base."""
    convert(str(goldens / "tiny_llava"), str(tmp_path / "base"), "run", "float32")
    source = open_base(ModelConfig(base=str(tmp_path / "base"), feature_layer=-1), 0)
    assert source.architecture.feature_layer == -1
    assert source.content_hash() == open_source(str(tmp_path / "base")).content_hash()
    trained_run(tmp_path / "run", tmp_path / "base", arch={"feature_layer": -1}, kind="lora")
    spec, _ = leaves_of(tmp_path / "run")
    assert spec.arch.feature_layer == -1


@pytest.mark.parametrize("name", ["a#b", "c?d", "e%41f", "g|h", "i j"])
def test_a_folder_may_have_signs_that_mean_something_in_a_url(tmp_path, goldens, name):
    folder = tmp_path / name
    shutil.copytree(goldens / "old_run" / "run" / "base", folder)
    assert open_source(str(folder)).content_hash() == open_source(str(goldens / "old_run/run/base")).content_hash()


def test_a_word_where_the_model_has_images_is_refused_for_training():
    tokenizer = Tokenizer.load(TOKENIZER)
    with pytest.raises(UserError, match=r"has the word '.*' as 400, where the model has images; use the"):
        check_image_token(tokenizer, 400)
    for free_or_special in (tokenizer.vocab_size, tokenizer.eos_id):
        check_image_token(tokenizer, free_or_special)
