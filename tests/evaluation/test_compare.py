"""Two evaluations compared question by question, and what is refused."""

from __future__ import annotations

import json
import subprocess

import pytest

from mole_jax.errors import UserError
from mole_jax.evaluation.compare import compare
from mole_jax.evaluation.metrics import paired_bootstrap
from tests.evaluation import checkpoints
from tests.tiny import ROOT

PINS = {"weights": "a", "prompt": "v1", "questions": "q", "metric": "exact_match", "metric_version": "1"}
REFERENCES = ["yes", "no"] * 20
GOOD = ["yes", "no"] * 18 + ["no", "no"] * 2
BAD = ["yes", "no"] * 10 + ["no", "yes"] * 10


def evaluation(folder, said, step=7, names=("docs",), **pins):
    """Writes what `Evaluator.run` leaves of one task or more."""
    file = folder / "eval" / f"step_{step:08d}.json"
    file.with_suffix("").mkdir(parents=True)
    task = {"score": 0.5, "loss": 1.0, "metric": "exact_match", "questions": 40, "pins": PINS | pins}
    file.write_text(json.dumps({"step": step, "tasks": dict.fromkeys(names, task)}))
    for name in names:
        lines = [
            {"id": str(i), "prediction": one, "references": [truth], "score": 0.0}
            for i, (one, truth) in enumerate(zip(said, REFERENCES, strict=True))
        ]
        (file.with_suffix("") / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_difference_is_that_of_the_pairs(tmp_path):
    a, b = evaluation(tmp_path / "a", BAD), evaluation(tmp_path / "b", GOOD, weights="b")
    found = compare(str(a), str(b)).tasks["docs"]
    scores = [[float(one == truth) for one, truth in zip(said, REFERENCES, strict=True)] for said in (BAD, GOOD)]
    difference, low, high, p = paired_bootstrap(scores[1], scores[0], seed=0)
    assert found == {
        "metric": "exact_match",
        "questions": 40,
        "a": 20 / 40,
        "b": 38 / 40,
        "difference": pytest.approx(18 / 40),
        "interval": [low, high],
        "p": p,
    }
    assert (difference, p < 0.001, low > 0.2) == (pytest.approx(18 / 40), True, True)


def test_the_last_step_counts_and_a_file_names_another(tmp_path):
    run = evaluation(tmp_path / "run", BAD, step=0)
    evaluation(tmp_path / "later", GOOD, step=200)
    (tmp_path / "later" / "eval" / "step_00000200").rename(run / "eval" / "step_00000200")
    (tmp_path / "later" / "eval" / "step_00000200.json").rename(run / "eval" / "step_00000200.json")
    found = compare(str(run / "eval" / "step_00000000.json"), str(run))
    assert (found.tasks["docs"]["a"], found.tasks["docs"]["b"]) == (20 / 40, 38 / 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": "r"}, "task docs: questions is 'q' in .* and 'r' in .*, so the scores do not compare"),
        ({"prompt": "plain"}, "task docs: prompt is 'v1' in .* and 'plain' in"),
        ({"metric_version": "2"}, "task docs: metric_version is '1' in .* and '2' in"),
        ({"image_size": 336}, "task docs: image_size is None in .* and 336 in"),
    ],
)
def test_other_questions_or_settings_are_refused(tmp_path, change, message):
    a, b = evaluation(tmp_path / "a", BAD), evaluation(tmp_path / "b", GOOD, **change)
    with pytest.raises(UserError, match=message) as caught:
        compare(str(a), str(b))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_told(tmp_path):
    a, b = evaluation(tmp_path / "a", BAD), evaluation(tmp_path / "b", GOOD, names=("docs", "photos"))
    with pytest.raises(UserError, match=r"a.*has no scores of task photos, the other has"):
        compare(str(a), str(b))
    with pytest.raises(UserError, match="nowhere: holds no evaluation"):
        compare(str(a), str(tmp_path / "nowhere"))
    old = [evaluation(tmp_path / name, BAD, metric_version="0") for name in ("c", "d")]
    with pytest.raises(UserError, match="was scored by version 0 of exact_match, this is 1; evaluate both again"):
        compare(*map(str, old))
    predictions, other = a / "eval" / "step_00000007" / "docs.jsonl", str(evaluation(tmp_path / "e", BAD))
    lines = predictions.read_text().splitlines(keepends=True)
    for left in (0, 17):
        predictions.write_text("".join(lines[:left]))
        with pytest.raises(UserError, match=rf"docs.jsonl: has {left} predictions of 40; evaluate"):
            compare(str(a), other)
    predictions.unlink()
    with pytest.raises(UserError, match="the predictions are gone"):
        compare(str(a), other)


@pytest.mark.parametrize(
    ("field", "value"), [("questions", None), ("metric", None), ("pins", {}), ("pins", {"metric_version": 1})]
)
def test_scores_without_what_belongs_to_them_are_told(tmp_path, field, value):
    a, b = evaluation(tmp_path / "a", BAD), evaluation(tmp_path / "b", GOOD)
    file = a / "eval" / "step_00000007.json"
    found = json.loads(file.read_text())
    found["tasks"]["docs"][field] = value
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=rf"step_00000007.json: is not as it was written \(tasks.docs.{field}"):
        compare(str(a), str(b))


def test_the_door_prints_the_table_and_writes_it(tmp_path):
    a, b = evaluation(tmp_path / "a", BAD), evaluation(tmp_path / "b", GOOD, weights="b")
    line = checkpoints.documented("--compare", lora_scores=a, scores=b, comparison=tmp_path / "out")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["tasks"]["docs"]
    low, high = (f"{100 * end:+.1f}" for end in found["interval"])
    cells = ["docs", "exact_match", "40", "50.0 %", "95.0 %", f"+45.0 [{low}, {high}]", f"{found['p']:.2g}"]
    assert "| " + " | ".join(cells) + " |" in (tmp_path / "out" / "comparison.md").read_text()
    assert all(cell in done.stdout for cell in cells)
    line[line.index(str(b))] = str(tmp_path)
    refused = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
