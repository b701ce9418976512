"""Held-out loss and greedy scores of a model, task by task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from mole_jax.config import Config, TaskConfig
from mole_jax.data.conversation import PROMPTS
from mole_jax.data.held_out import Question, held_out_batches, questions
from mole_jax.data.tokenizer import Tokenizer
from mole_jax.errors import UserError
from mole_jax.evaluation.metrics import METRIC_VERSIONS, METRICS, aggregate, bootstrap_interval
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parallel.mesh import batch_shards
from mole_jax.parallel.sharding import put_batch
from mole_jax.parameters import Tree
from mole_jax.serving.sampler import Prompt, Sampler, answer_text


def result_file(workdir: epath.Path, step: int) -> epath.Path:
    """Returns where the results of `step` are kept."""
    return workdir / "eval" / f"step_{step:08d}.json"


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on the tasks of a config."""

    config: Config
    arch: LlavaArchitecture
    graph: nnx.GraphDef
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    step: Callable[[Tree, Tree, Mapping[str, Any]], Any]
    """`mole_jax.training.step.Forward.evaluation_step`, jitted."""

    def run(self, workdir: epath.Path, step: int, params: Tree, frozen: Tree, *, generate: bool) -> dict[str, Any]:
        """Evaluates all tasks and writes ``eval/step_<step>.json``, predictions beside it and the use of the experts.

        Returns:
            ``{"step": step, "tasks": {name: {"loss", "answer_tokens", "score", "interval", "metric",
            "metric_version", "questions"}}}``: loss is nats per answer token, score the mean of the metric over
            questions; a metric with more numbers (`aggregate`) adds them by their names.

        Raises:
            UserError: a task's file cannot be read, or holds a broken record.
        """
        tasks: dict[str, dict[str, Any]] = {}
        use: dict[str, list] = {}
        for task in self.config.evaluation.tasks:
            loss, tokens, counts = self.held_out(task, params, frozen)
            tasks[task.name] = {"loss": loss, "answer_tokens": tokens, "score": None}
            if counts.size:
                use[task.name] = (counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)).tolist()
            if generate:
                tasks[task.name] |= self.score(task, params, frozen, workdir / "eval" / f"step_{step:08d}")
        result = {"step": step, "tasks": tasks}
        if jax.process_index() == 0:
            (workdir / "eval").mkdir(parents=True, exist_ok=True)
            if use:
                experts = {"domains": list(use), "use": list(use.values())}
                (workdir / "eval" / "expert_use.json").write_text(json.dumps(experts))
            result_file(workdir, step).write_text(json.dumps(result, indent=1))
        return result

    def held_out(self, task: TaskConfig, params: Tree, frozen: Tree) -> tuple[float, int, np.ndarray]:
        """Returns loss in nats per answer token, answer tokens, and tokens sent to each expert (L, E)."""
        batches = held_out_batches(
            task,
            self.config.data,
            tokenizer=self.tokenizer,
            image_size=self.arch.vision.image_size,
            image_span=self.arch.image_span,
            image_token_id=self.arch.image_token_id,
            rows=self._rows() // jax.process_count(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        total, tokens, use = 0.0, 0.0, np.zeros((0, 0))
        with jax.set_mesh(self.mesh):
            for batch in batches:
                sums = jax.device_get(self.step(params, frozen, put_batch(batch.arrays(), self.mesh)))
                total, tokens = total + float(sums.losses.sum()), tokens + float(sums.tokens.sum())
                counts = sums.use.sum(axis=0, dtype=np.float64)
                use = use + counts if use.size else counts
        if not tokens:
            raise UserError(
                f"{task.path}: task {task.name} has no example that fits data.sequence_length "
                f"{self.config.data.sequence_length}; raise it"
            )
        return total / tokens, int(tokens), use

    def score(self, task: TaskConfig, params: Tree, frozen: Tree, folder: epath.Path) -> dict[str, Any]:
        """Answers every question greedily, writes the predictions and returns their score with a 95 % interval."""
        asked = list(
            questions(
                task,
                self.config.data,
                tokenizer=self.tokenizer,
                image_size=self.arch.vision.image_size,
                image_span=self.arch.image_span,
                image_token_id=self.arch.image_token_id,
            )
        )
        answers = self._sampler(asked)(params, frozen, [Prompt(one.tokens, one.images) for one in asked])
        stop = PROMPTS[self.config.data.prompt].stop_text
        texts = [answer_text(self.tokenizer, answer, stop) for answer in answers]
        scores = [METRICS[task.metric](text, [one.answer]) for text, one in zip(texts, asked, strict=True)]
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps({"id": one.id, "prediction": text, "reference": one.answer, "score": score})
                for one, text, score in zip(asked, texts, scores, strict=True)
            ]
            (folder / f"{task.name}.jsonl").write_text("\n".join(lines) + "\n")
        numbers = aggregate(task.metric, texts, [[one.answer] for one in asked])
        return {
            **numbers,
            "interval": list(bootstrap_interval(scores, seed=self.config.seed)),
            "metric": task.metric,
            "metric_version": METRIC_VERSIONS[task.metric],
            "questions": len(asked),
        }

    def _sampler(self, asked: list[Question]) -> Sampler:
        settings = self.config.evaluation
        return Sampler(
            self.graph,
            self.mesh,
            batch_size=self._rows(),
            images_per_row=max(1, max(len(one.images) for one in asked)),
            image_size=self.arch.vision.image_size,
            max_new_tokens=settings.max_new_tokens,
            eos_id=self.tokenizer.eos_id,
            dtype=jnp.dtype(self.config.model.compute_dtype),
        )

    def _rows(self) -> int:
        """The batch size, rounded up to what the mesh divides."""
        shards = batch_shards(self.mesh)
        return -(-self.config.evaluation.batch_size // shards) * shards
