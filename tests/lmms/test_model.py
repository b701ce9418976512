"""The model inside the real lmms-eval: found by its entry point, and asked what it would be asked here."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from tests import tiny
from tests.evaluation import checkpoints

pytestmark = pytest.mark.lmms
evaluator = pytest.importorskip("lmms_eval.evaluator", reason="needs lmms-eval: pip install 'mole-jax[lmms]'")

TASK = """
task: mole_jax_test
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visual
doc_to_text: !function functions.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
process_results: !function functions.results
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mole")
    return checkpoints.write_run(folder / "run", checkpoints.write_base(folder / "base"))


def test_it_is_found_by_name():
    registry = pytest.importorskip("lmms_eval.models.registry_v2").ModelRegistryV2()
    if not importlib.metadata.entry_points(group="lmms_eval.models", name="mole_jax"):
        pytest.skip("needs mole-jax installed, not only its folder on the path, for the entry point")
    registry.load_entrypoint_manifests()
    assert registry.resolve("mole_jax").model_type == "chat"
    found = registry.get_model_class("mole_jax")
    assert (found.__module__, found.__name__) == ("mole_jax.lmms.model", "MoleJax")


def test_its_answers_are_those_of_generate(data, mole, tmp_path):
    """A task of lmms-eval on local files; two have the model's own answer as the reference, one has not."""
    from lmms_eval.tasks import TaskManager

    import mole_jax
    from mole_jax.config import DecodingConfig
    from mole_jax.lmms.model import MoleJax

    records = json.loads((data / "general" / "test.json").read_text())[:3]
    questions = [record["conversations"][0]["value"].replace("<image>\n", "") for record in records]
    images = [str(data / "general" / record["image"]) for record in records]
    model, processor = mole_jax.load(str(mole), tokenizer=tiny.TOKENIZER)
    answers = mole_jax.generate(
        model, processor, questions, [[image] for image in images], decoding=DecodingConfig(max_new_tokens=4)
    )
    expected = [*answers[:2], "something else"]
    lines = [
        {"question": question, "image": image, "answer": answer}
        for question, image, answer in zip(questions, images, expected, strict=True)
    ]
    (tmp_path / "questions.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "task.yaml").write_text(
        TASK.format(questions=tmp_path / "questions.json", cache=tmp_path / "cache").lstrip()
    )
    lm = MoleJax(str(mole), tokenizer=tiny.TOKENIZER, dtype="float32", batch_size="2", device=None)
    found = evaluator.simple_evaluate(
        lm,
        tasks=["mole_jax_test"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )
    said = sorted((sample["doc_id"], sample["filtered_resps"][0]) for sample in found["samples"]["mole_jax_test"])
    assert [text for _, text in said] == answers
    assert found["results"]["mole_jax_test"]["exact,none"] == pytest.approx(2 / 3)


def test_rounds_go_on_until_the_task_says_that_it_is_over(data, mole):
    from lmms_eval.api.instance import Instance

    from mole_jax.lmms.model import MoleJax

    lm = MoleJax(str(mole), tokenizer=tiny.TOKENIZER, dtype="float32")
    lm.task_dict = {"t": {"test": ["What?"]}}

    def messages(document, round_idx=None, previous_output=None, previous_round_info=None):
        def ask(words):
            return [{"role": "user", "content": [{"type": "text", "text": words}]}]

        if round_idx is None:
            return ask(document)
        return ask(f"You said {previous_output[-1]}. And?"), round_idx == 3, previous_output, previous_round_info

    settings = {"max_new_tokens": 3}
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until_multi_round", ("", messages, settings, 0, "t", "test"), 0, metadata)
    (rounds,) = lm.generate_until_multi_round([request])
    assert len(rounds) == 3
    once = Instance("generate_until", ("", messages, settings, 0, "t", "test"), 0, metadata)
    assert lm.generate_until([once]) == rounds[:1]
    with pytest.raises(NotImplementedError, match="chat model"):
        lm.loglikelihood([once])
    with pytest.raises(TypeError, match="takes no model argument basis"):
        MoleJax(str(mole), basis="x")
