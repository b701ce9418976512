"""Held-out loss and scores of a model, task by task."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from mole_jax.config import Config, DataConfig, TaskConfig
from mole_jax.data.held_out import HeldOut, Question, Questions, held_out_batches, questions
from mole_jax.data.template import answer_ends
from mole_jax.errors import UserError
from mole_jax.evaluation.answers import Answers
from mole_jax.evaluation.metrics import bootstrap_interval, by_ability, check_references, score_answers, score_of
from mole_jax.evaluation.pins import fingerprint, pins
from mole_jax.evaluation.tables import markdown, score_rows
from mole_jax.files import made, read_json_lines, write_json, write_json_lines, write_text
from mole_jax.forms import NUMBER
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.objective import Sums
from mole_jax.parallel import hosts
from mole_jax.parallel.mesh import batch_shards
from mole_jax.parallel.sharding import put_batch, reader
from mole_jax.parameters import Tree
from mole_jax.serving.sampler import Prompt, Sampler, ending
from mole_jax.terminal import shortened
from mole_jax.tokenizer import Tokenizer

READERS = 8
"""Threads that decode the images of the next questions while the model answers."""
PREDICTION = {"question": str, "prediction": str, "references": [str], "score": NUMBER}
"""Form of a line of predictions."""


def result_file(workdir: epath.Path, step: int) -> epath.Path:
    """Returns where the results of `step` are kept."""
    return workdir / "eval" / f"step_{step:08d}.json"


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on the tasks of a config.

    On several hosts every process calls it alike, with a `workdir` that they share; the first one writes.
    """

    config: Config
    arch: LlavaArchitecture
    graph: nnx.GraphDef
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    step: Callable[[Tree, Tree, Mapping[str, Any]], Any]
    """`mole_jax.model.objective.Forward.evaluation_step`, jitted."""

    def run(
        self, workdir: epath.Path, step: int, params: Tree, frozen: Tree, *, generate: bool, strict: bool = False
    ) -> dict[str, Any]:
        """Evaluates all tasks and writes ``eval/step_<step>.json``, a table and the predictions beside it, and the use
        of the experts.

        Questions that a killed evaluation has answered in `workdir` are not asked again.

        Args:
            workdir: the run's folder, or any other.
            step: of the checkpoint.
            params, frozen: the model's arrays.
            generate: also answer the questions and score.
            strict: refuse to begin anew where answers in `workdir` are of another model or other settings.

        Returns:
            ``{"step": step, "tasks": {name: {"loss", "answer_tokens", "examples", "exact", "score", "interval",
            "metric", "questions", "pins"}}, "abilities": {…}}``: those before score are of `held_out_result`, score is
            that of the metric; a metric with more numbers (`score_answers`) adds them by their names. `abilities` has
            Tiny LVLM-eHub's numbers (`by_ability`).

        Raises:
            UserError: a task's file cannot be read, or holds a broken record; or, with `strict`, `workdir` has answers
                of another evaluation.
        """
        tasks: dict[str, dict[str, Any]] = {}
        use: dict[str, list] = {}
        abilities: dict[Any, list[float]] = {}
        weights = fingerprint(self.config, self.arch, self.mesh, params, frozen) if generate else ""
        folder = result_file(workdir, step).with_suffix("")
        lines: dict[str, list] = {}
        for task in self.config.evaluation.tasks:
            tasks[task.name], counts = self.held_out(task, params, frozen)
            if counts.size:
                use[task.name] = expert_shares(counts)
            if generate:
                asked = self.questions(task)
                pinned = pins(self.config, self.arch, task, asked, weights)
                answers = Answers(partial_file(folder, task), pinned, strict=strict)
                self.answer(task, asked, answers, params, frozen)
                scores, numbers = self.score(task, asked, answers.texts)
                tasks[task.name] |= {**numbers, "questions": len(asked), "metric": task.metric, "pins": pinned}
                lines[task.name] = _predictions(asked, answers.texts, scores)
                if task.ability is not None:
                    abilities.setdefault(task.ability, []).extend(scores)
        result = {"step": step, "tasks": tasks} | ({"abilities": by_ability(abilities)} if abilities else {})
        if hosts.is_first():
            self._write(workdir, result, lines, use)
        return result

    def held_out(self, task: TaskConfig, params: Tree, frozen: Tree) -> tuple[dict[str, Any], np.ndarray]:
        """Returns what the model says of the known answers, and the tokens sent to each expert (L, E).

        On the first process with ``skipped``, records by reason, where some were left out. ``data`` says how its file
        was read.
        """
        batches, added = open_held_out(task, self.config, self.arch, self.tokenizer, self.mesh), []
        with jax.set_mesh(self.mesh):
            for batch in batches:
                added.append(jax.device_get(self.step(params, frozen, put_batch(batch.arrays(), self.mesh))))
        skipped = skipped_records(batches)
        found, use = held_out_result(task, self.config.data, added)
        return found | ({"skipped": skipped} if skipped else {}) | {"data": batches.remark}, use

    def questions(self, task: TaskConfig) -> Questions:
        """Opens the questions of a task.

        Raises:
            UserError: they cannot be read, or the metric cannot use a reference or lacks a library; all of it is told
                before the first question is asked.
        """
        asked = questions(task, self.config.data, tokenizer=self.tokenizer, image=self.arch.image)
        for number, one in enumerate(asked.listed):
            try:
                check_references(task.metric, one.references)
            except UserError as error:
                raise UserError(f"{task.path}: record {number} (id '{shortened(one.id)}'): {error}") from None
        return asked

    def answer(self, task: TaskConfig, asked: Questions, answers: Answers, params: Tree, frozen: Tree) -> None:
        """Answers those of the questions that `answers` does not hold yet, and adds them to it batch by batch."""
        begin, size = len(answers.texts), self.config.evaluation.batch_size
        hosts.agree(f"task {task.name} in a workdir that all share", {"questions": asked.sha256, "answers": begin})
        sampler = Sampler(
            self.graph,
            self.mesh,
            batch_size=size,
            eos_ids=answer_ends(asked.prompt, self.tokenizer, self.arch.decoder.eos_ids),
            dtype=jnp.dtype(self.config.model.compute_dtype),
            decoding=ending(task.decoding, asked.prompt),
            tokenizer=self.tokenizer,
            tile_features=self.arch.image.tile_features,
        )
        weights = sampler.weights(params, frozen)
        most, room = task.decoding.max_new_tokens, self.arch.decoder.max_position
        for batch in _read_ahead(asked, begin, size):
            for number, one in batch:
                if len(one.tokens) + most > room:
                    raise UserError(
                        f"{task.path}: record {number} (id '{shortened(one.id)}'): the question has {len(one.tokens)} "
                        f"tokens and the answer may have {most}, the model has room for {room} together; shorten it or "
                        f"lower decoding.max_new_tokens of task {task.name}"
                    )
            prompts = [Prompt(one.tokens, one.images, one.sources, one.weights, number) for number, one in batch]
            answers.add([one.id for _, one in batch], sampler.answers(weights, {}, prompts))

    def score(self, task: TaskConfig, asked: Questions, texts: Sequence[str]) -> tuple[list[float], dict[str, Any]]:
        """Returns the score of each question, and those of the task with a 95 % interval."""
        rows, numbers = score_answers(task.metric, texts, [one.references for one in asked.listed])
        interval = bootstrap_interval(rows, seed=self.config.seed, metric=task.metric)
        return score_of(task.metric, rows).tolist(), {**numbers, "interval": list(interval)}

    def _write(self, workdir: epath.Path, result: dict[str, Any], lines: dict[str, list], use: dict[str, list]) -> None:
        """Writes everything; the result itself last, since its being there means that all is."""
        file = result_file(workdir, result["step"])
        made(file.parent)
        for name, content in lines.items():
            write_json_lines(predictions_file(file, name), content)
        write_expert_use(workdir, use)
        write_text(file.with_suffix(".md"), markdown(score_rows(result)))
        write_json(file, result)
        for task in self.config.evaluation.tasks:
            partial_file(file.with_suffix(""), task).unlink(missing_ok=True)


def open_held_out(
    task: TaskConfig, config: Config, arch: LlavaArchitecture, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> HeldOut:
    """Opens the held-out set of a task in batches of `evaluation.batch_size`: of each the rows that this process reads.

    Raises:
        UserError: it cannot be read.
    """
    shards, (index, count) = batch_shards(mesh), reader(mesh)
    rows = -(-config.evaluation.batch_size // shards) * shards
    return held_out_batches(
        task,
        config.data,
        tokenizer=tokenizer,
        image=arch.image,
        rows=rows // count,
        process_index=index,
        process_count=count,
    )


def skipped_records(batches: HeldOut) -> dict[str, int]:
    """Returns how many records were skipped, by reason; on the first process of those of all."""
    counted = collections.Counter()
    for part in hosts.gathered("skipped", {why: len(records) for why, records in batches.skipped.items()}) or ():
        counted.update(part)
    return dict(counted)


def no_example(task: TaskConfig, data: DataConfig) -> UserError:
    """Returns the error of a task of which every record was left out."""
    return UserError(
        f"{task.path}: task {task.name} has no example that fits data.sequence_length {data.sequence_length}; raise it"
    )


def expert_shares(counts: np.ndarray) -> list[list[float]]:
    """Returns the share of a task's tokens that each expert gets, by layer, from the tokens (L, E)."""
    return (counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)).tolist()


def write_expert_use(workdir: epath.Path, use: Mapping[str, list]) -> None:
    """Writes the `expert_shares` of each task, if there are any, where the report looks for them."""
    if use:
        experts = {"domains": list(use), "use": list(use.values())}
        write_json(workdir / "eval" / "expert_use.json", experts)


def held_out_result(task: TaskConfig, data: DataConfig, added: Sequence[Sums]) -> tuple[dict[str, Any], np.ndarray]:
    """Returns a task's result without generated answers, from the sums of its batches, and the use of experts (L, E).

    ``{"loss": nats per answer token, "answer_tokens", "examples", "exact", "score": None}``; exact is the share of
    examples whose answers greedy decoding would give token for token.

    Raises:
        UserError: the task has no example that fits, or the model gives NaN or Inf.
    """
    tokens = sum(float(sums.tokens.sum()) for sums in added)
    if not tokens:
        raise no_example(task, data)
    loss = sum(float(sums.losses.sum()) for sums in added)
    if not math.isfinite(loss):
        raise UserError(
            f"task {task.name}: the model gives a loss of {loss} on {task.path}: its numbers overflow; take an earlier "
            "checkpoint, or train anew with a lower optimizer.learning_rate or optimizer.weight_decay"
        )
    examples, right = (sum(int(getattr(sums, name)) for sums in added) for name in ("rows", "right"))
    use = np.sum([sums.use.sum(axis=0, dtype=np.float64) for sums in added], axis=0)
    found = {"loss": loss / tokens, "answer_tokens": int(tokens), "examples": examples, "exact": right / examples}
    return found | {"score": None}, use


def predictions_file(result: epath.Path, task: str) -> epath.Path:
    """Returns where the predictions of a task are, beside a `result_file`."""
    return result.with_suffix("") / f"{task}.jsonl"


def example_answers(file: epath.Path, result: Mapping[str, Any], most: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the first `most` predictions of each task of a `result` kept in `file`; none of those without a score."""
    return {
        name: read_json_lines(predictions_file(file, name), PREDICTION)[:most]
        for name, task in result["tasks"].items()
        if task["score"] is not None and predictions_file(file, name).exists()
    }


def partial_file(folder: epath.Path, task: TaskConfig) -> epath.Path:
    """Returns where the answers of a task are until all tasks are evaluated."""
    return folder / f"{task.name}.partial.jsonl"


def _predictions(asked: Questions, texts: Sequence[str], scores: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"id": one.id, "question": one.text, "prediction": text, "references": one.references, "score": score}
        for one, text, score in zip(asked.listed, texts, scores, strict=True)
    ]


def _read_ahead(asked: Questions, begin: int, size: int) -> Iterator[list[tuple[int, Question]]]:
    """Yields the questions from `begin` on with their numbers, `size` at a time, reading the next while one is used."""
    with ThreadPoolExecutor(READERS) as pool:

        def submit(start: int) -> list[tuple[int, Future[Question]]]:
            numbers = range(start, min(start + size, len(asked)))
            return [(number, pool.submit(asked.__getitem__, number)) for number in numbers]

        waiting = submit(begin)
        for start in range(begin + size, len(asked) + size, size):
            batch, waiting = waiting, submit(start)
            yield [(number, question.result()) for number, question in batch]
