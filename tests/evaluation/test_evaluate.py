"""A checkpoint on tasks: what is asked, what is written, and that a kill costs nothing twice."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

import mole_jax
from mole_jax.config import DecodingConfig
from mole_jax.errors import UserError
from mole_jax.evaluation.checkpoint import evaluate_checkpoint
from mole_jax.evaluation.compare import compare
from mole_jax.evaluation.metrics import ABILITIES, METRIC_VERSIONS
from mole_jax.evaluation.report import summary_table
from mole_jax.files import absolute
from tests import tiny
from tests.evaluation import checkpoints

# One worker takes them all: they share the compiled programs and the checkpoints.
pytestmark = pytest.mark.xdist_group("evaluate")
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": tiny.CHILD_FLAGS}
SUFFIX = "\nAnswer the question using a single word or phrase."
SHORT = DecodingConfig(max_new_tokens=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoints.write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def mole(base, tmp_path_factory):
    return checkpoints.write_run(tmp_path_factory.mktemp("mole") / "run", base)


@pytest.fixture(scope="module")
def config(data):
    """Five abilities, one question of two each, the first with a suffix and several references."""
    records = json.loads((data / "general" / "test.json").read_text())[:2]
    records[0]["answers"] = ["nothing of the kind", "a b c"]
    records[1]["answers"] = [{"answer": "x", "answer_confidence": "yes"}, {"answer": "y"}]
    (data / "general" / "several.json").write_text(json.dumps(records))
    tasks: list[dict] = [
        {"name": ability, "limit": 2, "metric": "contains", "ability": ability, "decoding": SHORT}
        for ability in ABILITIES
    ]
    tasks[0] |= {"path": str(data / "general" / "several.json"), "suffix": SUFFIX}
    return checkpoints.config(data, *tasks)


@pytest.fixture(scope="module")
def scored(config, mole, tmp_path_factory):
    workdir = absolute(str(tmp_path_factory.mktemp("scores")))
    return workdir, evaluate_checkpoint(config, str(mole), workdir)


def predictions(workdir, task, step=0):
    path = Path(workdir) / "eval" / f"step_{step:08d}" / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_model(scored, config, mole, data):
    """The same questions by `mole_jax.generate`, which knows nothing of tasks: the same suffix, prompt and pixels."""
    model, processor = mole_jax.load(str(mole), tokenizer=tiny.TOKENIZER)
    for task in config.evaluation.tasks[:2]:
        records = json.loads(Path(task.path).read_text())[:2]
        asked = [record["conversations"][0]["value"] + task.suffix for record in records]
        images = [[str(data / "general" / record["image"])] for record in records]
        answers = mole_jax.generate(model, processor, asked, images, decoding=SHORT)
        assert [line["prediction"] for line in predictions(scored[0], task.name)] == answers
    without, suffixed = ([one["prediction"] for one in predictions(scored[0], name)] for name in ABILITIES[1::-1])
    assert suffixed != without, "the model sees the suffix"


def test_references_are_the_record_s(scored):
    assert [line["references"] for line in predictions(scored[0], ABILITIES[0])] == [
        ["nothing of the kind", "a b c"],
        ["x", "y"],
    ]


def test_the_result_says_what_decided_it(scored, config):
    workdir, result = scored
    assert json.loads((workdir / "eval" / "step_00000000.json").read_text()) == result
    pins = result["tasks"][ABILITIES[0]]["pins"]
    assert pins["suffix"] == SUFFIX
    assert pins["prompt"] == "v1"
    assert (pins["image_aspect"], pins["image_size"], pins["feature_layer"]) == ("pad", 28, -2)
    assert pins["decoding"] == dataclasses.asdict(SHORT) | {"stop": []}
    assert (pins["metric"], pins["metric_version"]) == ("contains", METRIC_VERSIONS["contains"])
    others = [result["tasks"][name]["pins"] for name in ABILITIES[1:]]
    assert all(other["weights"] == pins["weights"] for other in others)
    assert all(other["questions"] != pins["questions"] for other in others), "other references are other questions"
    assert not list((workdir / "eval" / "step_00000000").glob("*.partial*"))


def test_the_abilities_are_summed_up_in_the_table_and_the_report(scored):
    workdir, result = scored
    means = [result["tasks"][name]["score"] for name in ABILITIES]
    assert result["abilities"]["ability_sum"] == pytest.approx(sum(means))
    table = (workdir / "eval" / "step_00000000.md").read_text()
    assert f"| ability_sum | ability_sum | - | {100 * sum(means):.1f} | - |" in table
    assert table.count("\n") == 2 + 5 + 6
    assert "ability_sum" in summary_table(workdir)


@pytest.mark.slow
def test_four_devices_answer_as_one(scored, config, mole, tmp_path):
    name, evaluation = ABILITIES[0], dataclasses.replace(config.evaluation, tasks=config.evaluation.tasks[:1])
    mesh = dataclasses.replace(config.mesh, data=2, fsdp=2)
    config = dataclasses.replace(config, mesh=mesh, evaluation=evaluation)
    again = evaluate_checkpoint(config, str(mole), absolute(str(tmp_path)))
    assert predictions(tmp_path, name) == predictions(scored[0], name)
    assert again["tasks"][name]["pins"] == scored[1]["tasks"][name]["pins"]
    assert again["tasks"][name]["loss"] == pytest.approx(scored[1]["tasks"][name]["loss"], rel=1e-5)


def test_a_question_without_room_for_its_answer_is_told(config, mole, tmp_path):
    task = dataclasses.replace(config.evaluation.tasks[1], decoding=DecodingConfig(max_new_tokens=500))
    found = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, tasks=(task,)))
    with pytest.raises(
        UserError, match=r"record 0 \(id '.*'\): the question has \d+ tokens and the answer may have 500"
    ):
        evaluate_checkpoint(found, str(mole), absolute(str(tmp_path)))


def test_references_that_the_metric_cannot_use_are_told_before_anything_is_asked(config, mole, tmp_path):
    task = dataclasses.replace(config.evaluation.tasks[0], metric="yes_no", ability=None)
    found = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, tasks=(task,)))
    with pytest.raises(
        UserError, match=r"several\.json: record 0 \(id '.*'\): metric yes_no: the references .* must be"
    ):
        evaluate_checkpoint(found, str(mole), absolute(str(tmp_path)))
    assert not list(tmp_path.rglob("*.partial.jsonl"))


def test_a_killed_evaluation_asks_nothing_twice(data, mole, tmp_path):
    """SIGKILL while it answers; the same command again. An answer marked by hand in between is still there."""
    decoding = {"decoding": DecodingConfig(max_new_tokens=96), "limit": None, "path": str(data / "general/train.json")}
    sections = {"model": checkpoints.MODEL, "evaluation": {"batch_size": 1}}
    file = tmp_path / "config.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT)!r})\nfrom pathlib import Path\n"
        "from mole_jax.config import *\nfrom tests.evaluation import checkpoints\n\n"
        f"def get_config():\n    return checkpoints.config(Path({str(data)!r}), {decoding!r}, **{sections!r})\n"
    )
    workdir = tmp_path / "scores"
    line = checkpoints.documented("--checkpoint", quickstart=file, mole=mole, scores=workdir)
    partial = workdir / "eval" / "step_00000000" / "general.partial.jsonl"
    process = subprocess.Popen(line, env=ENVIRONMENT, cwd=tiny.ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not partial.exists() or partial.read_text().count("\n") < 4:
        assert process.poll() is None, "it was over before it could be killed"
        assert time.monotonic() < end, "three answers were not there in five minutes"
        time.sleep(0.005)
    process.kill()
    process.wait()
    header, *answers = partial.read_text().splitlines()
    assert 3 <= len(answers) < 24
    marked = json.loads(answers[1]) | {"prediction": "said before the kill"}
    partial.write_text("\n".join([header, answers[0], json.dumps(marked), *answers[2:], '{"id": "half']))
    done = subprocess.run(line, env=ENVIRONMENT, cwd=tiny.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "data: general: layout llava (by its keys)" in done.stderr.splitlines()
    found = predictions(workdir, "general")
    assert [one["id"] for one in found] == [record["id"] for record in json.loads(Path(decoding["path"]).read_text())]
    assert found[1]["prediction"] == "said before the kill"
    assert [one["prediction"] for one in found[: len(answers)]] == [
        json.loads(one)["prediction"] for one in (answers[0], json.dumps(marked), *answers[2:])
    ]
    assert all(one["prediction"] for one in found[len(answers) :])
    assert not partial.exists()


def test_other_settings_do_not_go_on_where_a_kill_left_off(scored, config, mole, tmp_path):
    name = ABILITIES[0]
    pins = scored[1]["tasks"][name]["pins"]
    partial = tmp_path / "eval" / "step_00000000" / f"{name}.partial.jsonl"
    partial.parent.mkdir(parents=True)
    partial.write_text(json.dumps({"pins": pins | {"suffix": ""}}) + "\n")
    with pytest.raises(UserError, match=r"whose suffix was '', it is now '\\nAnswer the question"):
        evaluate_checkpoint(config, str(mole), absolute(str(tmp_path)))


@pytest.mark.slow
def test_one_expert_against_the_mixture(config, mole, data, tmp_path):
    """`convert --expert 1 --tasks`: the folder holds one expert's model; the difference of the scores is printed."""
    file = tmp_path / "config.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT)!r})\nfrom pathlib import Path\n"
        "from mole_jax.config import *\nfrom tests.evaluation import checkpoints\n\n"
        f"def get_config():\n    return checkpoints.config(Path({str(data)!r}), {{'metric': 'anls'}}, "
        f"model={checkpoints.MODEL | {'tokenizer': tiny.TOKENIZER}!r})\n"
    )
    output = tmp_path / "expert"
    line = checkpoints.documented("mole_jax.convert", quickstart=file, mole=mole, expert_hf=output)
    line += ["--dtype", "float32"]
    done = subprocess.run(line, env=ENVIRONMENT, cwd=tiny.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "evaluation" / "comparison.json").read_text())
    assert compare(str(output / "evaluation" / "a"), str(output / "evaluation" / "b")).tasks == found["tasks"]
    assert f"{100 * found['tasks']['general']['difference']:+.1f}" in done.stdout
    model, processor = mole_jax.load(str(output), tokenizer=tiny.TOKENIZER)
    records = json.loads((data / "general" / "test.json").read_text())[:4]
    answers = mole_jax.generate(
        model,
        processor,
        [record["conversations"][0]["value"] for record in records],
        [[str(data / "general" / record["image"])] for record in records],
        decoding=SHORT,
    )
    assert [one["prediction"] for one in predictions(output / "evaluation" / "b", "general")] == answers
    assert [one["prediction"] for one in predictions(output / "evaluation" / "a", "general")] != answers
    line[line.index("--expert") : line.index("--expert") + 2] = []
    refused = subprocess.run(line, env=ENVIRONMENT, cwd=tiny.ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--tasks: goes with --expert" in refused.stderr


@pytest.mark.slow
def test_two_processes_answer_as_one(config, mole, data, tmp_path):
    """Each as on a host of its own: they share the rows of every batch, and the first one writes."""
    file = tmp_path / "config.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT)!r})\nfrom pathlib import Path\n"
        "from tests.evaluation import checkpoints\n\n"
        f"def get_config():\n    return checkpoints.config(Path({str(data)!r}), {{'limit': 5}})\n"
    )
    line = checkpoints.documented("--checkpoint", quickstart=file, mole=mole, scores=tmp_path / "two")
    line += ["--mesh.data", "2", "--coordinator", f"localhost:{free_port()}", "--processes", "2"]
    processes = [
        subprocess.Popen(
            [*line, "--process", str(i)], env=ENVIRONMENT, cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    printed = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert ["exact_match" in text for text in printed] == [True, False]
    tasks = tuple(dataclasses.replace(task, limit=5) for task in checkpoints.config(data, {}).evaluation.tasks)
    alone = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, tasks=tasks))
    expected = evaluate_checkpoint(alone, str(mole), absolute(str(tmp_path / "one")))["tasks"]["general"]
    found = json.loads((tmp_path / "two" / "eval" / "step_00000000.json").read_text())["tasks"]["general"]
    assert found == expected | {"loss": pytest.approx(expected["loss"], rel=1e-5)}
    assert predictions(tmp_path / "two", "general") == predictions(tmp_path / "one", "general")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
