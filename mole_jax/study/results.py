"""What a study left in its folder: `study.json`, and of every run the last evaluation, expert use and timing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from mole_jax.errors import UserError
from mole_jax.study.grid import Arm, Grid


@dataclasses.dataclass(frozen=True)
class ExpertUse:
    domains: tuple[str, ...]
    use: Float[np.ndarray, "D L E"]
    """Share of a domain's tokens that each expert gets."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One arm with one seed, finished."""

    scores: Mapping[str, float]
    """By domain, 0 to 1."""
    losses: Mapping[str, float]
    """By domain, nats per answer token; not finite where training diverged."""
    metrics: tuple[str, ...]
    """What each domain is scored by; "exact" is the known answer token for token, without generation."""
    questions: Mapping[str, int | None]
    expert_use: ExpertUse | None
    step_seconds: float | None
    batched: int | None
    """Seeds that ran together."""


@dataclasses.dataclass(frozen=True)
class Gap:
    """What a run lacks."""

    arm: str
    seed: int
    what: str


@dataclasses.dataclass(frozen=True)
class Results(Grid):
    """The grid, what is done of it, and what is not."""

    runs: Mapping[str, Mapping[int, RunResult]]
    """The finished ones, by arm's name and seed."""
    missing: tuple[Gap, ...]
    """The others, each with why."""
    remarks: tuple[Gap, ...]
    """What finished runs lack."""

    def questions(self, domain: str) -> list[int]:
        """Returns the numbers of test questions that the evaluations name: one, where all runs were asked the same."""
        runs = [run for by_seed in self.runs.values() for run in by_seed.values()]
        return sorted({count for run in runs if (count := run.questions[domain]) is not None})


def read(folder: epath.Path) -> Results:
    """Reads the study in `folder`.

    Raises:
        UserError: there is no study, a file is malformed, or the runs are scored by different metrics.
    """
    path = folder / "study.json"
    if not path.exists():
        raise UserError(f"{folder}: holds no study (study.json); name the --workdir of python -m mole_jax.study")
    grid = _parsed(path, Grid.from_json, "a study's grid")
    runs: dict[str, dict[int, RunResult]] = {arm.name: {} for arm in grid.arms}
    missing: list[Gap] = []
    remarks: list[Gap] = []
    for arm in grid.arms:
        for seed in grid.seeds:
            run = _run(folder / "runs" / arm.slug / f"seed_{seed}", arm, grid.domains)
            if isinstance(run, str):
                missing.append(Gap(arm.name, seed, run))
                continue
            runs[arm.name][seed] = run
            remarks += [Gap(arm.name, seed, remark) for remark in _remarks(arm, run)]
    metrics = {run.metrics: f"{arm}, seed {seed}" for arm, by_seed in runs.items() for seed, run in by_seed.items()}
    if len(metrics) > 1:
        (one, first), (other, second), *_ = ((", ".join(names), run) for names, run in metrics.items())
        raise UserError(f"{folder}: {first} is scored by {one}, {second} by {other}; evaluate them alike")
    return Results(**vars(grid), runs=runs, missing=tuple(missing), remarks=tuple(remarks))


def _run(folder: epath.Path, arm: Arm, domains: tuple[str, ...]) -> RunResult | str:
    """Returns the run, or why it does not count."""
    inside = folder / "eval"
    newest = max(inside.glob("step_*.json") if inside.exists() else (), default=None)
    if newest is None:
        return "no evaluation"
    step, run = _parsed(newest, lambda found: _evaluated(found, domains), "an evaluation of the study's domains")
    if step != arm.steps:
        return f"evaluated at step {step} of {arm.steps}"
    use, timing = inside / "expert_use.json", folder / "timing.json"
    if arm.kind == "mole" and use.exists():
        run = dataclasses.replace(run, expert_use=_parsed(use, _expert_use, "the use of experts"))
    if timing.exists():
        run = dataclasses.replace(run, **_parsed(timing, _timing, "a timing"))
    return run


def _evaluated(found: Any, domains: tuple[str, ...]) -> tuple[int, RunResult]:
    tasks = {domain: found["tasks"][domain] for domain in domains}
    scores = {}
    for domain, task in tasks.items():
        score = task.get("exact") if task.get("score") is None else task["score"]
        if score is None or not math.isfinite(score):
            raise ValueError(f"{domain}: score or exact is {score}, not a number")
        scores[domain] = float(score)
    losses = {domain: float(task["loss"]) for domain, task in tasks.items()}
    metrics = tuple("exact" if task.get("score") is None else str(task["metric"]) for task in tasks.values())
    questions = {domain: task.get("questions", task.get("examples")) for domain, task in tasks.items()}
    return int(found["step"]), RunResult(
        scores=scores,
        losses=losses,
        metrics=metrics,
        questions=questions,
        expert_use=None,
        step_seconds=None,
        batched=None,
    )


def _expert_use(found: Any) -> ExpertUse:
    use = np.asarray(found["use"], np.float64)
    if use.ndim != 3 or len(use) != len(found["domains"]):
        raise ValueError(f"use is of shape {use.shape}, not (domain, layer, expert)")
    return ExpertUse(tuple(found["domains"]), use)


def _timing(found: Any) -> dict[str, Any]:
    return {"step_seconds": float(found["step_seconds"]), "batched": int(found["batched"])}


def _remarks(arm: Arm, run: RunResult) -> list[str]:
    remarks = [
        f"the held-out loss on {domain} is {loss}: training diverged; the scores count, the arm shows no loss"
        for domain, loss in run.losses.items()
        if not math.isfinite(loss)
    ]
    if arm.kind == "mole" and run.expert_use is None:
        remarks.append("no eval/expert_use.json")
    if arm.steps and run.step_seconds is None:
        remarks.append("no timing.json")
    return remarks


def _parsed[T](path: epath.Path, parse: Callable[[Any], T], what: str) -> T:
    try:
        return parse(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: is not {what} ({why}); delete it and start the study again") from error
