"""A user's whole way with each family, from its folder as the hub has it: train, resume, evaluate, answer, export."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import mole_jax
from mole_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DecodingConfig,
    DomainConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    TaskConfig,
    TrainConfig,
)
from mole_jax.files import absolute
from mole_jax.training.loop import train
from mole_jax.weights.convert import convert
from tests.families.golden import FOLDER, NAMES

ANSWERS = ("A man ironing clothes.", "No.", "The first.", "Yes, sure.")


@pytest.fixture
def config(tmp_path):
    """Makes a run's config on the golden of a family: MoLE on its four pictures and a question without one."""

    def make(name: str) -> Config:
        for picture in FOLDER.joinpath(name).glob("picture_*.png"):
            shutil.copy(picture, tmp_path)
        records = [
            {
                "id": str(i),
                "image": f"picture_{i % 4}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is shown in the picture?"},
                    {"from": "gpt", "value": ANSWERS[i % 4]},
                ],
            }
            for i in range(6)
        ]
        words = [{"from": "human", "value": "Say 3"}, {"from": "gpt", "value": "3,141.59 %"}]
        records.append({"id": "text", "conversations": words})
        file = tmp_path / "records.json"
        file.write_text(json.dumps(records))
        decoding = DecodingConfig(max_new_tokens=6)
        return Config(
            name=name,
            model=ModelConfig(base=str(FOLDER / name), compute_dtype="float32", frozen_dtype="float32"),
            adapter=AdapterConfig(kind="mole", rank=2, alpha=4.0, experts=2, dropout=0.0),
            data=DataConfig(
                domains=(DomainConfig("all", str(file)),),
                sequence_length=320,
                tiles_per_row=20,
                examples_per_row=4,
                packing_bins=2,
            ),
            train=TrainConfig(steps=3, batch_rows=8),
            mesh=MeshConfig(fsdp=2),
            checkpoint=CheckpointConfig(every=1),
            evaluation=EvaluationConfig(tasks=(TaskConfig("all", str(file), decoding=decoding),), at_start=False),
        )

    return make


QUESTION = "What is shown in the picture?"


def losses(workdir) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_trained_resumed_evaluated_asked_and_exported(config, tmp_path, name):
    run, asked, settings = tmp_path / "run", FOLDER / name / "picture_0.png", config(name)
    train(settings, absolute(str(run)))
    whole = losses(run)
    assert np.isfinite(whole).all()
    report = json.loads((run / "data_report.json").read_text())["domains"]["all"]
    assert (report["examples"] > 0, report["skipped"]) == (True, {})
    predictions = (run / "eval" / "step_00000003" / "all.jsonl").read_text().splitlines()

    for step in (2, 3):  # as after a kill
        shutil.rmtree(run / "checkpoints" / str(step))
    shutil.rmtree(run / "eval" / "step_00000003")
    train(settings, absolute(str(run)))
    assert losses(run) == whole

    model, processor = mole_jax.load(str(run), dtype="float32")
    (answer,) = mole_jax.generate(model, processor, QUESTION, asked, decoding=DecodingConfig(max_new_tokens=6))
    assert answer == json.loads(predictions[0])["prediction"]

    convert(str(run), str(tmp_path / "hf"), "hf", expert=1)
    _, again = mole_jax.load(str(tmp_path / "hf"), dtype="float32")
    ours, theirs = processor(QUESTION, asked), again(QUESTION, asked)
    np.testing.assert_array_equal(theirs.tokens, ours.tokens)
    np.testing.assert_array_equal(theirs.images, ours.images)
