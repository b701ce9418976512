"""The metrics by name, their numbers over a set of questions, and how sure their mean is."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from mole_jax.config import Ability
from mole_jax.errors import nearest
from mole_jax.evaluation.answer_metrics import (
    anls,
    contains,
    exact_match,
    relaxed_accuracy,
    science_qa,
    vqa_accuracy,
)
from mole_jax.evaluation.caption_metrics import bleu, bleu_of, check_libraries, cider, rouge_l
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

SET_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], Float[np.ndarray, "Q K"]]] = {
    "cider": cider,
    "rouge_l": rouge_l,
    "bleu": bleu,
}
"""Metrics that only a whole set of questions has, by the same names."""

METRIC_VERSIONS: dict[str, str] = dict.fromkeys([*METRICS, *SET_METRICS], "1")
"""The version of each metric. A change that gives any answer another score raises it, and so does one of the numbers
that `score_answers` adds; result files keep it, and scores of different versions are not to be compared."""

ABILITIES: tuple[Ability, ...] = typing.get_args(Ability)
"""What Tiny LVLM-eHub's questions test (arXiv 2308.03729)."""

_EXTRA: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]] = {
    "yes_no": yes_no_numbers,
    "llava_med_closed": closed_as_released,
    "open_recall": recall_as_released,
}

_MOST_DRAWN = 4_000_000
"""Numbers of a table of draws that are in memory at a time."""

Means = Float[np.ndarray, "*sets K"]
"""Means over questions of the numbers of each question."""


def score_answers(
    metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Float[np.ndarray, "Q K"], dict[str, float]]:
    """Scores the answers to a set of questions.

    Args:
        metric: a name of `METRIC_VERSIONS`.
        predictions: one answer a question.
        references: the references of each question.

    Returns:
        The numbers of each question, of whose mean `score_of` makes the score; and the set's numbers:
        score: 0.0 to 1.0, but to 10.0 for cider.
        accuracy, precision, recall, f1, yes_ratio: of yes_no (`yes_no_numbers`).
        as_released: of llava_med_closed and open_recall, counted as the released script does.

    Raises:
        ValueError: an unknown metric, no question, or lists of different lengths.
        UserError: references that the metric cannot use, or a library that it needs is not installed.
    """
    if metric not in METRIC_VERSIONS:
        raise ValueError(f"score_answers: no metric is named '{metric}'{nearest(metric, METRIC_VERSIONS)}")
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"score_answers: {len(predictions)} predictions and {len(references)} lists of references")
    if metric in SET_METRICS:
        rows = SET_METRICS[metric](predictions, references)
    else:
        scores = [METRICS[metric](said, truths) for said, truths in zip(predictions, references, strict=True)]
        rows = np.asarray(scores, np.float64)[:, None]
    numbers = {"score": float(score_of(metric, rows.mean(axis=0)))}
    if metric in _EXTRA:
        numbers |= _EXTRA[metric](predictions, references)
    return rows, numbers


def check_references(metric: str, references: Sequence[str]) -> None:
    """Raises `UserError` if `metric` cannot use these references of a question, or lacks a library."""
    if metric in METRICS:
        METRICS[metric]("", references)
    else:
        check_libraries()


def score_of(metric: str, means: Means) -> Float[np.ndarray, "*sets"]:
    """Returns the score that the mean of questions' numbers makes; of a single question's numbers, its own score."""
    return bleu_of(means) if metric == "bleu" else means[..., 0]


def by_ability(scores: Mapping[Ability, Sequence[float]]) -> dict[str, float]:
    """Returns Tiny LVLM-eHub's numbers from the scores of the questions that test each ability.

    Returns:
        ability/NAME: the mean over the questions of each ability that has any.
        ability_sum: their sum, 0.0 to 5.0, if all five have some. Papers print it times 100.
    """
    means = {f"ability/{name}": float(np.mean(scores[name])) for name in ABILITIES if scores.get(name)}
    return means | {"ability_sum": sum(means.values())} if len(means) == len(ABILITIES) else means


def bootstrap_interval(
    rows: Sequence[float] | np.ndarray, *, seed: int, level: float = 0.95, resamples: int = 2000, metric: str = ""
) -> tuple[float, float]:
    """Percentile bootstrap interval of a set's score, by drawing its questions anew.

    Args:
        rows: the score of each question (Q), or its numbers (Q, K) as `score_answers` gives them.
        seed: the same rows and seed give the same interval.
        level: share of the distribution that is inside.
        resamples: how often the questions are drawn.
        metric: the one that `rows` are of; only bleu differs from a mean.

    Raises:
        ValueError: no question, or a `level` that is not between 0 and 1.
    """
    values = _checked("bootstrap_interval", rows, level)
    scores = score_of(metric, _resampled_means(values, seed, resamples))
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    a_rows: Sequence[float] | np.ndarray,
    b_rows: Sequence[float] | np.ndarray,
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 10_000,
    metric: str = "",
) -> tuple[float, float, float, float]:
    """Compares two checkpoints on the same questions by resampling the questions.

    Args:
        a_rows: of checkpoint a, one score (Q) or row of numbers (Q, K) a question.
        b_rows: those of checkpoint b, in the same order.
        seed, level, resamples, metric: as for `bootstrap_interval`.

    Returns:
        difference: score of a minus score of b.
        low, high: its percentile interval.
        p: two-sided; twice the share of resamples in which the difference is 0 or on the other side of it, at
            most 1 and never 0 (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 15).

    Raises:
        ValueError: no questions, unequal numbers of them, or a `level` that is not between 0 and 1.
    """
    a, b = _checked("paired_bootstrap", a_rows, level), _checked("paired_bootstrap", b_rows, level)
    if a.shape != b.shape:
        raise ValueError(f"paired_bootstrap needs as many scores of a as of b, got shapes {a.shape} and {b.shape}")
    width = a.shape[1]

    def difference(means: Means) -> np.ndarray:
        # Rounded, so that scores like 0.3 and 0.1 + 0.2 differ by nothing.
        return np.round(score_of(metric, means[..., :width]) - score_of(metric, means[..., width:]), 12)

    pairs = np.concatenate([a, b], axis=1)
    drawn = difference(_resampled_means(pairs, seed, resamples))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    p = min(1.0, 2 * (tail + 1) / (resamples + 1))
    return float(difference(pairs.mean(axis=0))), float(low), float(high), p


def _checked(function: str, rows: Sequence[float] | np.ndarray, level: float) -> Float[np.ndarray, "Q K"]:
    values = np.asarray(rows, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{function} needs the scores of at least one question, got shape {np.shape(rows)}")
    if not 0 < level < 1:
        raise ValueError(f"{function}: level is {level}, it must be between 0 and 1")
    return values


def _resampled_means(rows: Float[np.ndarray, "Q K"], seed: int, resamples: int) -> Float[np.ndarray, "S K"]:
    # A resample's mean needs only how often each distinct row is drawn; a few at a time bound the memory.
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    step = max(1, _MOST_DRAWN // len(distinct))
    means = [
        rng.multinomial(len(rows), counts / len(rows), size=min(step, resamples - start)) @ distinct / len(rows)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(means)
