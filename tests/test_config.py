"""`check`, and a config's way to JSON and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mole_jax.config import (
    AdapterConfig,
    Config,
    DataConfig,
    DecodingConfig,
    DomainConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
)
from mole_jax.config_check import check, check_decoding
from mole_jax.config_json import dataclass_from_json, from_json, to_json, typed
from mole_jax.errors import UserError
from mole_jax.model.architecture import PRESETS, LlavaArchitecture

VALID = Config(
    model=ModelConfig(preset="tiny"),
    data=DataConfig(domains=(DomainConfig("general", "a.json"), DomainConfig("document", "b.json", weight=2.0))),
    train=TrainConfig(steps=3),
)


def section(name: str, **changes) -> Config:
    """`VALID` with fields of one section changed."""
    return dataclasses.replace(VALID, **{name: dataclasses.replace(getattr(VALID, name), **changes)})


def test_a_valid_config_is_returned_unchanged():
    assert check(VALID) is VALID


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (section("model", base="x"), "exactly one of model.base and model.preset"),
        (section("model", preset=None), "exactly one of model.base and model.preset"),
        (section("adapter", targets=("q_prj",)), "adapter.targets has 'q_prj', did you mean 'q_proj'?"),
        (section("adapter", rank=0), "adapter.rank is 0"),
        (section("adapter", dropout=1.0), "adapter.dropout is 1.0"),
        (section("adapter", experts=0), "adapter.experts is 0"),
        (section("adapter", targets=("q_proj",)), "adapter.targets has none of gate_proj"),
        (section("adapter", kind="none"), "adapter.kind is none but train.trainable names"),
        (section("adapter", kind="lora"), "adapter.kind is not mole"),
        (section("train", trainable=("adapter",)), "train.trainable has 'adapter', did you mean 'adapters'?"),
        (section("train", trainable=()), "train.trainable is empty"),
        (section("train", steps=None), "exactly one of train.steps and train.epochs"),
        (section("train", epochs=1.0), "exactly one of train.steps and train.epochs"),
        (section("train", batch_rows=10, accumulation=4), "does not divide"),
        (section("train", accumulation=0), "train.accumulation is 0, it must be at least 1"),
        (section("train", steps=0), "train.steps is 0, it must be at least 1"),
        (section("adapter", expert_path="grouped", router_gradient="dense"), "router_gradient dense uses all"),
        (section("adapter", shared_rank=-1), "adapter.shared_rank is -1, it must not be negative"),
        (section("adapter", shared_router=True, router_bias=True), "adapter.shared_router has no bias"),
        (section("adapter", domain_weight=-1.0), "adapter.domain_weight is -1.0, it must not be negative"),
        (section("adapter", domain_weight=1.0, route_by="domain"), "that adapter.domain_weight could teach"),
        (section("adapter", domain_weight=1.0), "adapter.experts 3 idle; set adapter.experts 2, or the weight to 0"),
        (section("data", domains=(DomainConfig("a", "x", repeat=0.0),)), "a has repeat 0.0, it must be over 0"),
        (section("data", temperature=0.0), "data.temperature is 0.0, it must be over 0"),
        (section("data", shards=0), "data.shards is 0, it must be at least 1"),
        (section("data", max_tiles=0), "data.max_tiles is 0, it must be at least 1"),
        (section("data", workers=-1), "data.workers is -1, it must not be negative"),
        (section("optimizer", router_learning_rate=-1.0), "optimizer.router_learning_rate is -1.0, it must not be"),
        (section("optimizer", b2=1.0), "optimizer.b2 is 1.0, must be in [0, 1)"),
        (section("optimizer", clip_norm=0.0), "optimizer.clip_norm is 0.0, it must be over 0, or None for no clipping"),
        (section("mesh", slices=0), "mesh.slices is 0, it must be at least 1"),
        (section("checkpoint", keep_best=-1), "checkpoint.keep_best is -1, it must not be negative"),
        (section("track", to=("wandbb",)), "track.to has 'wandbb', did you mean 'wandb'?"),
        (section("track", to=("wandb", "wandb")), "track.to has two trackers of one name"),
        (section("track", project=" "), "track.project is empty"),
        (section("track", examples=-1), "track.examples is -1, it must not be negative"),
        (section("evaluation", every=0), "evaluation.every is 0, it must be at least 1"),
        (section("evaluation", tasks=(TaskConfig("a", "x", limit=0),)), "evaluation.tasks: a has limit 0"),
        (
            section("evaluation", tasks=(TaskConfig("a", "x", ability="visual_reasoning"),)),
            "a has ability visual_reasoning with metric exact_match",
        ),
        (
            section("evaluation", tasks=(TaskConfig("a", "x", decoding=DecodingConfig(top_p=0.0)),)),
            "config: evaluation.tasks: a.decoding.top_p is 0.0, it must be over 0 and at most 1",
        ),
        (section("data", domains=()), "data.domains is empty"),
        (section("data", domains=(DomainConfig("a", "x"), DomainConfig("a", "y"))), "two domains of one name"),
        (section("data", domains=(DomainConfig("a", "x", weight=-1.0),)), "a has weight -1.0"),
        (section("data", domains=(DomainConfig("a", "x", weight=0.0),)), "every weight is 0"),
        (section("data", domains=(DomainConfig("a", "x", cap=0),)), "a has cap 0"),
        (section("data", sequence_length=0), "data.sequence_length is 0"),
        (section("optimizer", warmup_fraction=1.0), "optimizer.warmup_fraction is 1.0"),
        (section("mesh", data=0), "mesh.data is 0"),
        (section("checkpoint", keep_last=0), "checkpoint.keep_last is 0"),
        (section("evaluation", tasks=(TaskConfig("a", "x"), TaskConfig("a", "y"))), "two tasks of one name"),
    ],
)
def test_a_mistake_is_named_with_its_field(config: Config, message: str):
    with pytest.raises(UserError) as caught:
        check(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        VALID,
        Config(),
        Config(
            adapter=AdapterConfig(kind="lora", targets=("q_proj",)),
            optimizer=OptimizerConfig(clip_norm=None, eps=1e-30, projector_learning_rate=2e-5),
            mesh=MeshConfig(data=2, fsdp=4),
            evaluation=EvaluationConfig(tasks=(TaskConfig("t", "x.json", limit=5),), at_start=False),
        ),
    ],
)
def test_json_round_trip_is_exact(config: Config):
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config
    assert hash(again) == hash(config)  # tuples are tuples again
    assert repr(again) == repr(config)


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[2Kb", "../up", "a/b", "x" * 201, "\u202eb", "\ud800"])
def test_a_name_that_cannot_name_a_file_is_refused(name: str):
    domains = (DomainConfig(name, "a.json"),)
    with pytest.raises(UserError, match=r"(?s)data\.domains has a name .*; a name is 1 to 200 bytes"):
        check(dataclasses.replace(VALID, data=DataConfig(domains=domains)))
    tasks = EvaluationConfig(tasks=(TaskConfig(name, "a.json"),))
    with pytest.raises(UserError, match=r"evaluation\.tasks has a name"):
        check(dataclasses.replace(VALID, evaluation=tasks))


@pytest.mark.parametrize("top_k", [None, 0, 1, 10**9])
def test_top_k_0_is_off_as_in_transformers(top_k):
    check_decoding(DecodingConfig(top_k=top_k), "decoding")
    with pytest.raises(UserError, match=r"decoding\.top_k is -1, it must not be negative; 0 is all tokens"):
        check_decoding(DecodingConfig(top_k=-1), "decoding")


def test_a_name_may_hold_what_is_no_formula():
    assert check(dataclasses.replace(VALID, data=DataConfig(domains=(DomainConfig(r"$\frac{$", "a.json"),))))


def test_json_without_a_field_takes_its_default():
    values = to_json(VALID)
    del values["checkpoint"], values["train"]["log_every"]
    assert from_json(values) == VALID


def test_json_of_earlier_versions_is_read():
    values = to_json(VALID)
    values["data"]["images_per_row"] = values["data"].pop("tiles_per_row") + 5
    values["model"]["remat"] = "dots"
    read = from_json(values)
    assert (read.data.tiles_per_row, read.model.remat) == (VALID.data.tiles_per_row + 5, "most")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": {}}, "unknown field 'optimiser', did you mean 'optimizer'?"),
        ({"train": {"step": 3}}, "unknown field 'train.step', did you mean 'train.steps'?"),
        ({"train": {"steps": 1.5}}, "train.steps expects an integer or None, got 1.5"),
        ({"train": {"steps": True}}, "train.steps expects an integer or None, got True"),
        ({"train": 3}, "train expects a TrainConfig, got 3"),
        (
            {"adapter": {"kind": "molle"}},
            "adapter.kind expects one of none, lora, mole, got 'molle', did you mean 'mole'?",
        ),
        ({"data": {"domains": [{"name": "a"}]}}, "field 'data.domains.0.path' is missing"),
        ({"data": {"domains": [{"name": "a", "path": 1}]}}, "data.domains.0.path expects text, got 1"),
        ({"evaluation": {"generate": 1}}, "evaluation.generate expects True or False, got 1"),
        ({"adapter": {"targets": "q_proj"}}, "adapter.targets expects a tuple, each text, got 'q_proj'"),
    ],
)
def test_json_mistakes_are_named(change: dict, message: str):
    with pytest.raises(UserError) as caught:
        from_json(change, where="runs/x/config.json")
    assert str(caught.value) == f"runs/x/config.json: {message}"


def test_whole_numbers_are_fine_where_numbers_are_meant():
    config = typed(section("optimizer", learning_rate=1))
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)


@pytest.mark.parametrize("arch", PRESETS.values(), ids=PRESETS)
def test_other_dataclasses_go_to_json_and_back(arch: LlavaArchitecture):
    values = json.loads(json.dumps(to_json(arch)))
    assert dataclass_from_json(values, LlavaArchitecture, where="meta") == arch
