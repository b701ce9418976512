"""The metrics by name, their numbers over a set of questions, and how sure their mean is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mole_jax.errors import nearest
from mole_jax.evaluation.answer_metrics import (
    anls,
    contains,
    exact_match,
    relaxed_accuracy,
    science_qa,
    vqa_accuracy,
)
from mole_jax.evaluation.medical_metrics import (
    closed_as_released,
    closed_strict,
    llava_med_closed,
    open_recall,
    recall_as_released,
)
from mole_jax.evaluation.yes_no_metrics import yes_no, yes_no_numbers

Metric = Callable[[str, Sequence[str]], float]

METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "contains": contains,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "yes_no": yes_no,
    "llava_med_closed": llava_med_closed,
    "closed_strict": closed_strict,
    "open_recall": open_recall,
    "science_qa": science_qa,
}
"""By the name that `TaskConfig.metric` uses; each takes a prediction and its references and gives 0.0 to 1.0."""

METRIC_VERSIONS: dict[str, str] = dict.fromkeys(METRICS, "1")
"""The version of each metric. A change that gives any answer another score raises it, and so does one of the numbers
that `aggregate` adds; result files keep it, and scores of different versions are not to be compared."""

ABILITIES = (
    "visual_perception",
    "visual_knowledge_acquisition",
    "visual_reasoning",
    "visual_commonsense",
    "object_hallucination",
)
"""What Tiny LVLM-eHub's questions test (arXiv 2308.03729)."""

_EXTRA: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]] = {
    "yes_no": yes_no_numbers,
    "llava_med_closed": closed_as_released,
    "open_recall": recall_as_released,
}


def aggregate(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    abilities: Sequence[str] | None = None,
) -> dict[str, float]:
    """Returns the numbers of a whole set of questions, 0.0 to 1.0 each but the sum.

    Args:
        metric: a name of `METRICS`.
        predictions: one answer a question.
        references: the references of each question.
        abilities: which of `ABILITIES` each question tests, for Tiny LVLM-eHub's numbers.

    Returns:
        score: the mean over questions.
        accuracy, precision, recall, f1, yes_ratio: of yes_no (`yes_no_numbers`).
        as_released: of llava_med_closed and open_recall, counted as the released script does.
        ability/NAME: the mean over the questions of an ability that occurs in `abilities`.
        ability_sum: their sum, 0.0 to 5.0, if all five occur. Tables print it times 100.

    Raises:
        ValueError: an unknown metric or ability, no question, or lists of different lengths.
        UserError: references that the metric cannot use.
    """
    if metric not in METRICS:
        raise ValueError(f"aggregate: no metric is named '{metric}'{nearest(metric, METRICS)}")
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"aggregate: {len(predictions)} predictions and {len(references)} lists of references")
    scores = [METRICS[metric](said, truths) for said, truths in zip(predictions, references, strict=True)]
    numbers = {"score": float(np.mean(scores))}
    if metric in _EXTRA:
        numbers |= _EXTRA[metric](predictions, references)
    if abilities is not None:
        numbers |= _by_ability(scores, abilities)
    return numbers


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray, *, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `scores`, each the score of one question.

    The same scores and seed give the same interval. Raises `ValueError` without scores, or if `level` is not
    between 0 and 1.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"bootstrap_interval needs a list of at least one score, got shape {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"bootstrap_interval: level is {level}, it must be between 0 and 1")
    low, high = np.quantile(_resampled_means(values, seed, resamples), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    a_scores: Sequence[float] | np.ndarray,
    b_scores: Sequence[float] | np.ndarray,
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 10_000,
) -> tuple[float, float, float, float]:
    """Compares two checkpoints on the same questions by resampling the questions.

    Args:
        a_scores: one score a question, of checkpoint a.
        b_scores: those of checkpoint b, in the same order.
        seed: the same scores and seed give the same numbers.
        level: of the interval.
        resamples: how often the questions are drawn anew.

    Returns:
        difference: mean of a minus mean of b.
        low, high: its percentile interval.
        p: two-sided; twice the share of resamples in which the difference is 0 or on the other side of it, at
            most 1 and never 0 (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 15).

    Raises:
        ValueError: no scores, unequal numbers of them, or a `level` that is not between 0 and 1.
    """
    a, b = np.asarray(a_scores, np.float64), np.asarray(b_scores, np.float64)
    if a.ndim != 1 or a.size == 0 or a.shape != b.shape:
        raise ValueError(f"paired_bootstrap needs two equally long lists of scores, got shapes {a.shape} and {b.shape}")
    if not 0 < level < 1:
        raise ValueError(f"paired_bootstrap: level is {level}, it must be between 0 and 1")
    # Rounded, so that scores like 0.3 and 0.1 + 0.2 differ by nothing and equal differences are one value.
    means = _resampled_means(np.round(a - b, 12), seed, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # A mean of cancelling differences may miss 0 by its last bits, and it has to count on both sides.
    tail = min(np.count_nonzero(means <= 1e-12), np.count_nonzero(means >= -1e-12))
    p = min(1.0, 2 * (tail + 1) / (resamples + 1))
    return float(a.mean() - b.mean()), float(low), float(high), p


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    # A resample's mean needs only how often each distinct score is drawn, so memory does not grow with
    # the number of questions.
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(values.size, counts / values.size, size=resamples)
    return drawn @ distinct / values.size


def _by_ability(scores: Sequence[float], abilities: Sequence[str]) -> dict[str, float]:
    if len(abilities) != len(scores):
        raise ValueError(f"aggregate: {len(scores)} questions and {len(abilities)} abilities")
    if unknown := sorted(set(abilities) - set(ABILITIES)):
        raise ValueError(f"aggregate: no ability is named '{unknown[0]}'{nearest(unknown[0], ABILITIES)}")
    means: dict[str, float] = {}
    for ability in ABILITIES:
        own = [score for score, of in zip(scores, abilities, strict=True) if of == ability]
        if own:
            means[f"ability/{ability}"] = float(np.mean(own))
    return means | {"ability_sum": sum(means.values())} if len(means) == len(ABILITIES) else means
