"""The loop in this process: NaN, best checkpoints, another mesh, a trained projector as a base."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from mole_jax import config_json
from mole_jax.config import DomainConfig, ModelConfig
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.training.loop import train
from mole_jax.training.telemetry import read_metrics
from tests import tiny

NO_EVALUATION = {"tasks": ()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def test_nan_stops_the_run_after_three_steps_and_names_the_records(data, tmp_path, capsys):
    """A learning rate of 1e30 makes the second step's loss infinite or NaN."""
    config = tiny.config(
        data,
        optimizer={"learning_rate": 1e30, "clip_norm": None},
        train={"steps": 20, "max_bad_steps": 3},
        evaluation=NO_EVALUATION,
    )
    with pytest.raises(UserError, match=r"3 steps in a row up to step \d+ gave a NaN or Inf") as caught:
        train(config, absolute(str(tmp_path)))
    assert "\n" not in str(caught.value)
    events = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert len(events) >= 3
    names = {domain.name for domain in config.data.domains}
    for event in events:
        assert event["records"]
        assert {record.split("/")[0] for record in event["records"]} <= names
    assert f"Records: {events[0]['records'][0]}" in capsys.readouterr().err
    lines = read_metrics(tmp_path)
    assert lines[0]["loss"] is not None
    assert lines[events[0]["step"] - 1]["loss"] is None


def test_text_alone_needs_no_place_for_images(tmp_path):
    """The same losses with places that stay empty and with none; a record with an image is then told."""
    turns = [{"from": "human", "value": "How many sides?"}, {"from": "gpt", "value": "three"}]
    records = [{"id": str(number), "conversations": turns} for number in range(9)]
    (tmp_path / "text.json").write_text(json.dumps(records))

    def config(places: int, **more):
        domains = (DomainConfig("text", str(tmp_path / "text.json")),)
        made = tiny.config(tmp_path, train={"steps": 2}, evaluation=NO_EVALUATION)
        return dataclasses.replace(
            made, data=dataclasses.replace(made.data, domains=domains, tiles_per_row=places, **more)
        )

    losses = []
    for places in (2, 0):
        train(config(places), absolute(str(tmp_path / str(places))))
        losses.append([line["loss"] for line in read_metrics(tmp_path / str(places))])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    records.append(
        {"id": "seen", "image": "a.png", "conversations": [{**turns[0], "value": "<image> What?"}, turns[1]]}
    )
    (tmp_path / "text.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"record 9 \(id 'seen'\), field image: 1 images, over data.tiles_per_row 0"):
        train(config(0, on_too_long="error"), absolute(str(tmp_path / "seen")))


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_another_mesh_resumes(data, tmp_path):
    """Six of eight steps on one device, the rest on four: the losses are those of one device throughout."""
    options = {
        "optimizer": {"learning_rate": 3e-3, "warmup_fraction": 0.0},
        "train": {"steps": 8, "batch_rows": 8},
        "checkpoint": {"every": 1, "keep_last": 1, "keep_best": 1},
        "evaluation": {**NO_EVALUATION, "tasks": tiny.config(data).evaluation.tasks[:1], "every": 2, "generate": False},
    }
    train(tiny.config(data, **options), absolute(str(tmp_path / "one")))
    kept = sorted(int(child.name) for child in (tmp_path / "one" / "checkpoints").iterdir())
    results = {
        step: json.loads((tmp_path / "one" / "eval" / f"step_{step:08d}.json").read_text()) for step in (2, 4, 6, 8)
    }
    best = min(results, key=lambda step: results[step]["tasks"]["general"]["loss"])
    assert kept == sorted({best, 8})

    stopped = tiny.config(data, **{**options, "checkpoint": {"every": 3, "keep_last": 2, "keep_best": 0}})
    four = dataclasses.replace(stopped, mesh=dataclasses.replace(stopped.mesh, data=2, fsdp=2))
    workdir = tmp_path / "moved"
    train(stopped, absolute(str(workdir)))
    # Forget what came after the checkpoint of step 6, as a kill would have.
    assert {child.name for child in (workdir / "checkpoints").iterdir()} == {"6", "8"}
    shutil.rmtree(workdir / "checkpoints" / "8")
    train(four, absolute(str(workdir)))
    first, second = read_metrics(tmp_path / "one"), read_metrics(workdir)
    np.testing.assert_allclose([line["loss"] for line in second], [line["loss"] for line in first], rtol=1e-4)


def test_projector_pretraining_is_a_base_for_lora(data, tmp_path):
    """LLaVA's two stages: captions train the projector alone; then its run is the base of an adapter run."""
    captions = DomainConfig("captions", str(data / "captions" / "train.json"))
    first = tiny.config(
        data,
        adapter={"kind": "none"},
        train={"steps": 2, "trainable": ("projector",)},
        data={"domains": (captions,), "prompt": "plain", "image_aspect": "crop", "on_bad_record": "skip"},
        evaluation=NO_EVALUATION,
    )
    train(first, absolute(str(tmp_path / "projector")))
    rows = json.loads((tmp_path / "projector" / "trainable.json").read_text())
    assert {row["group"] for row in rows} == {"projector"}
    # Some of the synthetic captions have no picture, which the prompt preset `plain` cannot take: counted, not hidden.
    report = json.loads((tmp_path / "projector" / "data_report.json").read_text())
    assert report["domains"]["captions"]["skipped"]["bad record"] > 0
    second = dataclasses.replace(
        tiny.config(
            data,
            adapter={"kind": "lora"},
            train={"steps": 2, "trainable": ("adapters",), "batch_rows": 4},
            evaluation=NO_EVALUATION,
        ),
        model=ModelConfig(
            base=str(tmp_path / "projector"), frozen_dtype="bfloat16", compute_dtype="bfloat16", remat="most"
        ),
    )
    train(second, absolute(str(tmp_path / "lora")))
    assert len(read_metrics(tmp_path / "lora")) == 2
    saved = config_json.from_json(json.loads((tmp_path / "lora" / "config.json").read_text()))
    # With what the config left to its base.
    assert saved == dataclasses.replace(second, data=dataclasses.replace(second.data, prompt="v1", image_aspect="pad"))


def test_epochs_are_counted_exactly(data, tmp_path):
    """One epoch by size is every record once: 72 records in rows of one example are 9 batches of 8."""
    config = tiny.config(
        data,
        data={"mix": "size", "examples_per_row": 1},
        train={"steps": None, "epochs": 1.0},
        evaluation=NO_EVALUATION,
    )
    train(config, absolute(str(tmp_path)))
    assert len(read_metrics(tmp_path)) == 72 // 8
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert {name: domain["examples"] for name, domain in report["domains"].items()} == {
        "general": 24,
        "document": 24,
        "biomedical": 24,
    }


@pytest.mark.slow
def test_a_run_whose_dropout_was_drawn_in_another_way_says_so(data, tmp_path, capsys):
    config = tiny.config(data, adapter={"dropout": 0.1}, checkpoint={"every": 2, "keep_last": 3})
    train(config, tmp_path / "run")
    for step in ("4", "6"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    (meta,) = (tmp_path / "run" / "checkpoints" / "2" / "meta").glob("metadata")
    facts = json.loads(meta.read_text())
    assert facts.pop("masks") == "words"  # the version before had no such field
    meta.write_text(json.dumps(facts))
    capsys.readouterr()
    train(config, tmp_path / "run")
    assert "checkpoint 2 is of a version that drew dropout's masks in another way" in capsys.readouterr().err
