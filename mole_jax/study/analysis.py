"""From the runs of a study to the numbers that its report shows; no words and no pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mole_jax.adapters.usage import information_bound, mutual_information
from mole_jax.study.config import Curve
from mole_jax.study.grid import MAIN, Arm
from mole_jax.study.results import Results
from mole_jax.study.statistics import Difference, Estimate, Series, estimate, holm, paired, verdict

MEAN = "mean of domains"
"""The column beside the domains; by seed, so that its interval knows how the domains of a seed go together."""
Columns = Mapping[str, Series]
Estimates = Mapping[str, Estimate | None]
Differences = Mapping[str, Difference | None]


@dataclasses.dataclass(frozen=True)
class ArmResult:
    arm: Arm
    seeds: int
    scores: Estimates
    loss: Estimate | None
    """Held-out, mean of the domains; None also where a run diverged."""
    step_time: float | None
    """Ratio of the median step to that of the baseline on the same mixture, batched alike."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an arm scores beside the baseline's single-domain runs: an arm of the conflict matrix."""

    arm: Arm
    scores: Estimates
    alone: Estimates
    differences: Differences


@dataclasses.dataclass(frozen=True)
class Comparison:
    a: Arm
    b: Arm
    scores_a: Estimates
    scores_b: Estimates
    differences: Differences
    p: float | None
    """Of the mean of the domains, corrected for the number of comparisons (Holm)."""
    verdict: str
    """Of a against b."""


@dataclasses.dataclass(frozen=True)
class CurveValue:
    value: float
    alone: Estimates
    mixture: Estimates
    differences: Differences


@dataclasses.dataclass(frozen=True)
class Specialisation:
    arm: Arm
    information: Estimate
    """Mutual information of expert and domain in nats, mean over layers: it does not see the order of experts."""
    most: float
    """What it can be at most."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    results: tuple[ArmResult, ...]
    mixture: str | None
    """The mixture of all domains with as many samples of each as the single-domain runs have."""
    conflict: tuple[Cost, ...]
    """The baseline on every mixture of the main section."""
    adapters: tuple[Cost, ...]
    """The other adapters on `mixture`."""
    comparisons: tuple[Comparison, ...]
    curves: Mapping[str, tuple[CurveValue, ...]]
    experts: tuple[Specialisation, ...]

    def result(self, arm: Arm) -> ArmResult:
        return next(result for result in self.results if result.arm == arm)

    @property
    def baseline(self) -> Cost | None:
        """The baseline on `mixture`."""
        return next((cost for cost in self.conflict if cost.arm.mixture == self.mixture), None)


def analyse(results: Results) -> Analysis:
    """Computes all numbers of the report."""
    matrix = [arm for arm in results.section(MAIN) if arm.adapter == results.baseline]
    own = {domain: arm for arm in matrix for domain in results.domains if arm.shares == {domain: 1.0}}
    alone = _alone(results, own)
    mixture = next((arm.mixture for arm in matrix if arm.shares == dict.fromkeys(results.domains, 1.0)), None)
    others = [arm for arm in results.section(MAIN) if arm.mixture == mixture and arm.adapter != results.baseline]
    return Analysis(
        results=tuple(_result(results, arm) for arm in results.arms),
        mixture=mixture,
        conflict=tuple(_cost(results, arm, alone) for arm in matrix),
        adapters=tuple(_cost(results, arm, alone) for arm in others),
        comparisons=_comparisons(results),
        curves={curve.name: _curve(results, curve) for curve in results.curves},
        experts=tuple(found for arm in results.arms if (found := _specialisation(results, arm)) is not None),
    )


def scores(results: Results, arm: Arm) -> Columns:
    """Returns the arm's scores by seed, of every domain and of their mean."""
    runs = results.runs[arm.name]
    return _with_mean({domain: {seed: run.scores[domain] for seed, run in runs.items()} for domain in results.domains})


def _alone(results: Results, own: Mapping[str, Arm]) -> Columns:
    """The scores of a domain are those of the run that saw only this domain."""
    return _with_mean(
        {domain: scores(results, own[domain])[domain] if domain in own else {} for domain in results.domains}
    )


def _with_mean(columns: Columns) -> Columns:
    common = set.intersection(*(set(column) for column in columns.values()))
    means = {seed: sum(column[seed] for column in columns.values()) / len(columns) for seed in sorted(common)}
    return {MEAN: means, **columns}


def _estimates(columns: Columns) -> Estimates:
    return {name: estimate(list(column.values())) for name, column in columns.items()}


def _differences(a: Columns, b: Columns) -> Differences:
    return {name: paired(a[name], b[name]) for name in a}


def _result(results: Results, arm: Arm) -> ArmResult:
    runs = results.runs[arm.name].values()
    losses = [sum(run.losses.values()) / len(run.losses) for run in runs]
    return ArmResult(
        arm=arm,
        seeds=len(runs),
        scores=_estimates(scores(results, arm)),
        loss=estimate(losses) if all(map(math.isfinite, losses)) else None,
        step_time=_step_time(results, arm),
    )


def _step_time(results: Results, arm: Arm) -> float | None:
    same = (other for other in results.arms if (other.mixture, other.adapter) == (arm.mixture, results.baseline))
    baseline = next(same, None)
    if baseline is None:
        return None
    (seconds, batched), (reference, batched_too) = _timing(results, arm), _timing(results, baseline)
    # A seed's share of a step differs with the seeds that run together, whatever the adapter.
    return seconds / reference if seconds and reference and batched == batched_too else None


def _timing(results: Results, arm: Arm) -> tuple[float | None, set[int | None]]:
    timed = [run for run in results.runs[arm.name].values() if run.step_seconds is not None]
    seconds = [run.step_seconds for run in timed if run.step_seconds is not None]
    return (float(np.median(seconds)) if seconds else None), {run.batched for run in timed}


def _cost(results: Results, arm: Arm, alone: Columns) -> Cost:
    found = scores(results, arm)
    return Cost(arm, _estimates(found), _estimates(alone), _differences(found, alone))


def _comparisons(results: Results) -> tuple[Comparison, ...]:
    arms = [(results.arm(a), results.arm(b)) for a, b in results.comparisons]
    pairs = [(a, b, scores(results, a), scores(results, b)) for a, b in arms]
    tests = [_differences(of_a, of_b) for _, _, of_a, of_b in pairs]
    ps = holm([test.p if (test := differences[MEAN]) else None for differences in tests])
    return tuple(
        Comparison(
            a=a,
            b=b,
            scores_a=_estimates(of_a),
            scores_b=_estimates(of_b),
            differences=differences,
            p=p,
            verdict=verdict(test.mean, p) if (test := differences[MEAN]) else verdict(0.0, None),
        )
        for (a, b, of_a, of_b), differences, p in zip(pairs, tests, ps, strict=True)
    )


def _curve(results: Results, curve: Curve) -> tuple[CurveValue, ...]:
    values = []
    for value, mixed, own in sorted(curve.points, key=lambda point: point[0]):
        alone = _alone(results, {domain: results.arm(name) for domain, name in own.items()})
        mixture = scores(results, results.arm(mixed))
        values.append(CurveValue(value, _estimates(alone), _estimates(mixture), _differences(mixture, alone)))
    return tuple(values)


def _specialisation(results: Results, arm: Arm) -> Specialisation | None:
    uses = [run.expert_use.use for run in results.runs[arm.name].values() if run.expert_use is not None]
    information = estimate([float(mutual_information(use).mean()) for use in uses])
    if information is None:
        return None
    return Specialisation(arm, information, information_bound(uses[0]))


def sections(results: Results) -> Sequence[str]:
    """Returns the sections of the grid but the main one, in the order in which the arms name them."""
    return [name for name in dict.fromkeys(name for arm in results.arms for name in arm.sections) if name != MAIN]
