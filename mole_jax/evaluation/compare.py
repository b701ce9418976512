"""Two checkpoints on the same questions: the difference of their scores, question by question."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from mole_jax.config import Config
from mole_jax.errors import UserError
from mole_jax.evaluation.checkpoint import evaluate_checkpoint, with_own_prompt
from mole_jax.evaluation.metrics import METRIC_VERSIONS, paired_bootstrap, score_answers
from mole_jax.evaluation.pins import WEIGHTS, first_difference
from mole_jax.evaluation.runner import predictions_file
from mole_jax.evaluation.tables import EVALUATION, aligned, markdown
from mole_jax.evaluation.tables import score as percent
from mole_jax.files import made, path_of, read_json, read_json_lines, write_json, write_text
from mole_jax.forms import misfit
from mole_jax.weights.open import open_source

PREDICTION = {"prediction": str, "references": [str]}
"""What is used of a line of predictions."""
SCORED = {"metric": str, "questions": int, "pins": {"metric_version": str}}
"""What is used of a task with a score."""
SEED = 0
"""Of the resamples: the same two evaluations always compare alike."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found; ``tasks[name]`` has a, b, difference (b - a), interval (95 %), p, metric, questions."""

    a: str
    b: str
    tasks: dict[str, dict[str, Any]]

    def rows(self) -> list[list[str]]:
        """A table, heading first; scores and differences are times 100."""
        rows = [["task", "metric", "questions", "A", "B", "B - A", "p"]]
        for name, task in self.tasks.items():
            a, b = (percent({"score": task[side], "metric": task["metric"]}) for side in "ab")
            low, high = (f"{100 * end:+.1f}" for end in task["interval"])
            difference = f"{100 * task['difference']:+.1f} [{low}, {high}]"
            rows.append([name, task["metric"], str(task["questions"]), a, b, difference, f"{task['p']:.2g}"])
        return rows

    def text(self) -> str:
        """The table for a terminal."""
        return f"A: {self.a}\nB: {self.b}\n\n{aligned(self.rows())}\n\n{self._note()}"

    def write(self, folder: epath.Path) -> None:
        """Writes ``comparison.json`` and ``comparison.md``."""
        write_json(made(folder) / "comparison.json", dataclasses.asdict(self))
        table = f"- A: `{self.a}`\n- B: `{self.b}`\n\n{markdown(self.rows())}\n{self._note()}\n"
        write_text(folder / "comparison.md", table)

    @staticmethod
    def _note() -> str:
        return "B - A in points, with 95 % interval and two-sided p, by paired bootstrap over the questions."


def compare(a: str, b: str) -> Comparison:
    """Compares two evaluations on the same questions.

    Args:
        a, b: for each the folder in which it was evaluated, whose last step counts, or an ``eval/step_N.json``.

    Raises:
        UserError: an evaluation is not there or not whole, the two have not the same tasks, or a task was asked
            otherwise: other questions, prompt, image preparation, decoding or metric. The message names the first.
    """
    (file_a, tasks_a), (file_b, tasks_b) = _read(a), _read(b)
    for name in {**tasks_a, **tasks_b}:
        for file, tasks in ((file_a, tasks_a), (file_b, tasks_b)):
            if name not in tasks:
                raise UserError(f"{file}: has no scores of task {name}, the other has; evaluate both on the same tasks")
    found = {}
    for name, task in tasks_a.items():
        pins_a, pins_b = task["pins"], tasks_b[name]["pins"]
        differs = first_difference(pins_a, pins_b, but=WEIGHTS)
        if differs is not None:
            raise UserError(
                f"task {name}: {differs} is {pins_a.get(differs)!r} in {file_a} and {pins_b.get(differs)!r} in "
                f"{file_b}, so the scores do not compare; evaluate one of them again"
            )
        found[name] = _paired(name, task, pins_a["metric_version"], file_a, file_b)
    return Comparison(str(file_a), str(file_b), found)


def compare_checkpoints(
    config: Config, a: str, b: str, workdir: epath.Path, *, base: str | None = None, alpha: float | None = None
) -> Comparison:
    """Evaluates two checkpoints, into ``workdir/a`` and ``workdir/b``, compares them and writes that into `workdir`.

    Both are asked with the prompt and image preparation that `a` was trained with; the config's, where it names none.

    Args:
        config: the tasks.
        a, b: whatever `open_source` recognises.
        workdir: for the results.
        base, alpha: of `a`, as in `open_source`.

    Raises:
        UserError: as `evaluate_checkpoint` and `compare`.
    """
    source = open_source(a, base=base, alpha=alpha)
    evaluation = dataclasses.replace(config.evaluation, generate=True)
    config = dataclasses.replace(config, data=with_own_prompt(config.data, source), evaluation=evaluation)
    evaluate_checkpoint(config, a, workdir / "a", base=base, alpha=alpha)
    evaluate_checkpoint(config, b, workdir / "b")
    found = compare(str(workdir / "a"), str(workdir / "b"))
    found.write(workdir)
    return found


def _read(path: str) -> tuple[epath.Path, dict[str, Any]]:
    """Returns the result's file and its tasks."""
    file = path_of(path)
    if file.is_dir():
        inside = file / "eval" if (file / "eval").is_dir() else file
        file = max(inside.glob("step_*.json"), default=None)
    if file is None or not file.exists():
        raise UserError(f"{path}: holds no evaluation (eval/step_*.json); evaluate that checkpoint first")
    read = read_json(file, EVALUATION, remedy="name the folder of an evaluation, or evaluate that checkpoint again")
    tasks = {name: task for name, task in read["tasks"].items() if task.get("score") is not None}
    if not tasks:
        raise UserError(f"{file}: has no scores; evaluate with evaluation.generate on")
    for name, task in tasks.items():
        if wrong := misfit(task, SCORED, f"tasks.{name}"):
            raise UserError(f"{file}: is not as it was written ({wrong}); evaluate that checkpoint again")
    return file, tasks


def _paired(name: str, task: Mapping[str, Any], version: str, file_a: epath.Path, file_b: epath.Path) -> dict[str, Any]:
    metric = task["metric"]
    if version != METRIC_VERSIONS.get(metric):
        raise UserError(
            f"{file_a}: task {name} was scored by version {version} of {metric}, this is "
            f"{METRIC_VERSIONS.get(metric, 'no such metric')}; evaluate both again"
        )
    scored = (_scored(name, metric, task["questions"], file) for file in (file_a, file_b))
    rows, numbers = zip(*scored, strict=True)
    difference, low, high, p = paired_bootstrap(rows[1], rows[0], seed=SEED, metric=metric)
    return {
        "metric": metric,
        "questions": len(rows[0]),
        "a": numbers[0]["score"],
        "b": numbers[1]["score"],
        "difference": difference,
        "interval": [low, high],
        "p": p,
    }


def _scored(name: str, metric: str, questions: int, file: epath.Path):
    """Scores the predictions again: a set's metric needs all of a question's numbers, the file has its score."""
    path = predictions_file(file, name)
    if not path.exists():
        raise UserError(f"{path}: the predictions are gone; evaluate that checkpoint again")
    lines = read_json_lines(path, PREDICTION)
    if len(lines) != questions:
        raise UserError(f"{path}: has {len(lines)} predictions of {questions}; evaluate that checkpoint again")
    return score_answers(metric, [line["prediction"] for line in lines], [line["references"] for line in lines])
