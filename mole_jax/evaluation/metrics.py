"""Scores of one answer, and how sure their mean is."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np

Metric = Callable[[str, Sequence[str]], float]


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if `prediction` equals a reference after lower-casing, stripping white space and one full stop."""
    return float(_plain(prediction) in {_plain(reference) for reference in references})


def contains(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the words of a reference stand in `prediction`, whole, in order and side by side.

    As Tiny LVLM-eHub scores: case and punctuation do not count. It rewards long answers; "no" does not stand
    in "normal". A reference without any word scores only where `prediction` has none either.
    """
    said = _words(prediction)
    for reference in references:
        sought = _words(reference)
        if not sought:
            if not said:
                return 1.0
            continue
        if any(said[start : start + len(sought)] == sought for start in range(len(said) - len(sought) + 1)):
            return 1.0
    return 0.0


METRICS: dict[str, Metric] = {"exact_match": exact_match, "contains": contains}
"""By the name that `TaskConfig.metric` uses; each takes a prediction and its references and gives 0.0 to 1.0."""


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
    rng = np.random.default_rng(seed)
    # A resample's mean needs only how often each distinct score is drawn, so memory does not grow with
    # the number of questions.
    distinct, counts = np.unique(values, return_counts=True)
    drawn = rng.multinomial(values.size, counts / values.size, size=resamples)
    means = drawn @ distinct / values.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").strip()


_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation.replace("'", ""), " ") | {"'": ""})


def _words(text: str) -> list[str]:
    """Lower-case words; punctuation parts words, save an apostrophe and a point or comma inside a number."""
    words = []
    for word in text.lower().split():
        core = word.strip(string.punctuation)
        number = core.replace(",", "").replace(".", "", 1)
        words += [core.replace(",", "")] if number.isdigit() else core.translate(_TO_SPACE).split()
    return words
