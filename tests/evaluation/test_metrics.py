"""Scores: each trap that a looser or a stricter definition would fall into."""

from __future__ import annotations

import numpy as np
import pytest

from mole_jax.evaluation.metrics import METRICS, bootstrap_interval, contains, exact_match


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("47", ["47"], 1),
        (" BANK.\n", ["bank"], 1),
        ("There are two objects", ["There are two objects."], 1),
        ("yes", ["no", "yes"], 1),
        ("47 dollars", ["47"], 0),
        ("normal", ["no"], 0),
        ("a  b", ["a b"], 0),
        ("bank..", ["bank"], 0),
        ("", [""], 1),
        ("yes", [], 0),
    ],
)
def test_exact_match(prediction, references, score):
    assert exact_match(prediction, references) == score


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("The answer is 47.", ["47"], 1),
        ("There is a left lung opacity, I think", ["left lung opacity"], 1),
        ("LEFT-lung opacity", ["left lung opacity"], 1),
        ("lung left opacity", ["left lung opacity"], 0),
        ("normal", ["no"], 0),
        ("147", ["47"], 0),
        ("it's", ["its"], 1),
        ("about 1,234 of them", ["1234"], 1),
        ("3.5 cm", ["3"], 0),
        ("It is 3.", ["3"], 1),
        ("anything", ["..."], 0),
        ("", ["yes"], 0),
        ("nothing", ["yes", "nothing"], 1),
    ],
)
def test_contains(prediction, references, score):
    assert contains(prediction, references) == score


def test_metrics_are_named_as_in_the_config():
    assert {"exact_match": exact_match, "contains": contains} == METRICS


def test_interval_has_the_width_of_the_normal_approximation():
    scores = np.array([1.0] * 120 + [0.0] * 280)
    low, high = bootstrap_interval(scores, seed=0)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.006)
    assert high == pytest.approx(0.3 + half, abs=0.006)
    assert bootstrap_interval(scores, seed=0) == (low, high)
    narrow = bootstrap_interval(scores, seed=0, level=0.5)
    assert low < narrow[0] < 0.3 < narrow[1] < high


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.random(60) < 0.4, seed=n, resamples=500) for n in range(300)]
    covered = np.mean([low <= 0.4 <= high for low, high in intervals])
    assert 0.9 < covered < 0.985


def test_interval_of_fractional_and_constant_scores():
    assert bootstrap_interval([0.5, 0.5, 0.5], seed=0) == (0.5, 0.5)
    low, high = bootstrap_interval([0.0, 0.25, 1.0, 0.75] * 20, seed=0)
    assert 0.4 < low < 0.5 < high < 0.6


@pytest.mark.parametrize(("scores", "level"), [([], 0.95), ([[1.0]], 0.95), ([1.0], 0), ([1.0], 95)])
def test_interval_refuses_nonsense(scores, level):
    with pytest.raises(ValueError, match="bootstrap_interval"):
        bootstrap_interval(scores, seed=0, level=level)
