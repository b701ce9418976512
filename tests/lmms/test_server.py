"""The real lmms-eval, its model `openai`, against the real server."""

from __future__ import annotations

import json

import pytest

import mole_jax
from mole_jax.config import DecodingConfig, ServeConfig
from tests import tiny
from tests.evaluation import checkpoints

pytestmark = pytest.mark.lmms
evaluator = pytest.importorskip("lmms_eval.evaluator", reason="needs lmms-eval: pip install 'mole-jax[lmms]'")


def test_it_asks_the_server_and_gets_the_answers_of_generate(tmp_path):
    """A task with pictures, eight questions at a time; the reference of half of them is the model's own answer."""
    from lmms_eval.tasks import TaskManager

    from mole_jax.serving.service import Service
    from tests.lmms.test_model import FUNCTIONS, TASK
    from tests.serving.test_serve import KEY, serving

    data = tiny.write_data(tmp_path / "data")
    mole = checkpoints.write_run(tmp_path / "run", checkpoints.write_base(tmp_path / "base"))
    records = json.loads((data / "general" / "test.json").read_text())
    questions = [record["conversations"][0]["value"].replace("<image>\n", "") for record in records]
    images = [str(data / "general" / record["image"]) for record in records]
    model, processor = mole_jax.load(str(mole), tokenizer=tiny.TOKENIZER)
    answers = mole_jax.generate(model, processor, questions, images, decoding=DecodingConfig(max_new_tokens=4))
    lines = [
        {"question": question, "image": image, "answer": answer if number % 2 else "something else"}
        for number, (question, image, answer) in enumerate(zip(questions, images, answers, strict=True))
    ]
    (tmp_path / "questions.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "task.yaml").write_text(
        TASK.format(questions=tmp_path / "questions.json", cache=tmp_path / "cache").lstrip()
    )
    service = Service.of(model, processor, ServeConfig(slots=3, context=256), "tiny")
    with serving(service) as url:
        found = evaluator.simple_evaluate(
            "openai",
            model_args=f"model_version=tiny,base_url={url}/v1,api_key={KEY},num_concurrent=8,max_retries=1,timeout=100",
            tasks=["mole_jax_test"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            batch_size=1,
            bootstrap_iters=0,
        )
    said = sorted((sample["doc_id"], sample["filtered_resps"][0]) for sample in found["samples"]["mole_jax_test"])
    assert [text for _, text in said] == answers
    assert found["results"]["mole_jax_test"]["exact,none"] == pytest.approx(0.5)
