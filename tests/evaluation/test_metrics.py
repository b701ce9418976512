"""The metrics by name, numbers of whole sets, and how sure a mean and a difference are."""

from __future__ import annotations

import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_jax.config import TaskConfig
from mole_jax.evaluation import metrics
from mole_jax.evaluation.metrics import (
    ABILITIES,
    METRIC_VERSIONS,
    METRICS,
    SET_METRICS,
    bootstrap_interval,
    by_ability,
    paired_bootstrap,
    score_answers,
    score_of,
)


def test_metrics_are_named_as_in_the_config():
    names = typing.get_args(typing.get_type_hints(TaskConfig)["metric"])
    assert list(names) == [*METRICS, *SET_METRICS] == list(METRIC_VERSIONS)
    assert all((METRICS | SET_METRICS)[name].__name__ == name for name in names)
    assert all(isinstance(version, str) and version for version in METRIC_VERSIONS.values())


@pytest.mark.parametrize("name", METRICS)
@given(prediction=st.text("yesnorAB1.5%,'- \nThe", max_size=20), truth=st.sampled_from(["yes", "no"]))
def test_scores_are_from_0_to_1_and_the_reference_is_right(name, prediction, truth):
    references = ["B"] if name == "science_qa" else [truth]
    assert 0 <= METRICS[name](prediction, references) <= 1
    assert METRICS[name](references[0], references) == 1
    assert METRICS[name](prediction, []) == 0


def test_the_score_is_the_mean():
    rows, numbers = score_answers("anls", ["abcd", "abcx", "zzzz"], [["abcd"], ["abcd"], ["abcd"]])
    assert numbers == {"score": pytest.approx((1 + 0.75 + 0) / 3)}
    assert score_of("anls", rows).tolist() == [1, 0.75, 0]


def test_what_a_metric_has_besides():
    pope = score_answers("yes_no", ["yes", "yes", "no"], [["yes"], ["no"], ["no"]])[1]
    assert set(pope) == {"score", "accuracy", "precision", "recall", "f1", "yes_ratio"}
    assert pope["score"] == pope["accuracy"] == pytest.approx(2 / 3)
    assert pope["yes_ratio"] == pytest.approx(2 / 3)
    closed = score_answers("llava_med_closed", ["yes", "no"], [["yes"], ["yes"]])[1]
    assert closed == {"score": 0.5, "as_released": 1.0}
    assert score_answers("open_recall", ["a b b"], [["b c"]])[1] == {"score": 0.5, "as_released": pytest.approx(2 / 3)}


def test_abilities_are_means_and_their_sum():
    # Two questions of the first ability, so that the sum of the means is not the mean of the scores times five.
    means = [0.5, 1, 1, 0, 1]
    scores = {name: [float(mean)] for name, mean in zip(ABILITIES, means, strict=True)}
    scores[ABILITIES[0]] = [1.0, 0.0]
    numbers = by_ability(scores)
    assert numbers["ability_sum"] == pytest.approx(3.5)
    assert [numbers[f"ability/{name}"] for name in ABILITIES] == means


def test_there_is_no_sum_without_all_five():
    assert by_ability({ABILITIES[2]: [1.0]}) == {f"ability/{ABILITIES[2]}": 1}


def test_scoring_refuses_nonsense():
    with pytest.raises(ValueError, match="did you mean 'exact_match'"):
        score_answers("exactmatch", ["a"], [["a"]])
    for predictions, references in ([], []), (["a"], []):
        with pytest.raises(ValueError, match="lists of references"):
            score_answers("anls", predictions, references)


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


@pytest.mark.parametrize(("scores", "level"), [([], 0.95), ([[[1.0]]], 0.95), ([1.0], 0), ([1.0], 95)])
def test_interval_refuses_nonsense(scores, level):
    with pytest.raises(ValueError, match="bootstrap_interval"):
        bootstrap_interval(scores, seed=0, level=level)


def test_paired_difference_has_the_width_of_the_normal_approximation():
    # 400 questions: 60 that only a answers, 30 that only b does, the rest alike.
    a = np.array([1.0] * 60 + [0.0] * 30 + [1.0] * 200 + [0.0] * 110)
    b = np.array([0.0] * 60 + [1.0] * 30 + [1.0] * 200 + [0.0] * 110)
    difference, low, high, p = paired_bootstrap(a, b, seed=0)
    spread = (90 / 400 - (30 / 400) ** 2) ** 0.5 / 400**0.5
    assert difference == pytest.approx(30 / 400)
    assert (low, high) == pytest.approx((difference - 1.96 * spread, difference + 1.96 * spread), abs=0.004)
    # The sign test of 60 against 30 has a p of about 0.0016.
    assert 0.0005 < p < 0.004
    assert paired_bootstrap(a, b, seed=0) == (difference, low, high, p)
    back = paired_bootstrap(b, a, seed=1)
    assert back[:3] == pytest.approx((-difference, -high, -low), abs=0.004)


def test_pairs_matter():
    # The same two means, question by question alike or not: only the pairs tell that a is always a little better.
    b = np.tile([0.0, 0.3, 0.6, 0.9], 25)
    sure = paired_bootstrap(b + 0.01, b, seed=0)
    unsure = paired_bootstrap(np.roll(b, 1) + 0.01, b, seed=0)
    assert sure[0] == pytest.approx(unsure[0]) == pytest.approx(0.01)
    assert sure[1:3] == pytest.approx((0.01, 0.01))
    assert sure[3] < 0.001 < 0.2 < unsure[3]


def test_no_difference_has_a_p_of_one():
    assert paired_bootstrap([0.1 + 0.2, 1.0], [0.3, 1.0], seed=0)[1:] == (0, 0, 1)
    # Differences that cancel only but for rounding count as none on both sides.
    assert paired_bootstrap([0.3, 0.0] * 3, [0.0, 0.3] * 3, seed=0)[3] == 1


def test_p_is_small_as_often_as_it_says():
    # Where there is no difference, p is under 0.1 in a tenth of all cases.
    rng = np.random.default_rng(2)
    values = [
        paired_bootstrap(rng.random(100) < 0.5, rng.random(100) < 0.5, seed=n, resamples=1000)[3] for n in range(300)
    ]
    assert 0.05 < np.mean(np.array(values) < 0.1) < 0.16


@pytest.mark.parametrize(
    ("a", "b", "level"), [([], [], 0.95), ([1.0], [1.0, 0.0], 0.95), ([[1.0]], [[1.0, 0.0]], 0.95), ([1.0], [0.0], 1)]
)
def test_paired_bootstrap_refuses_nonsense(a, b, level):
    with pytest.raises(ValueError, match="paired_bootstrap"):
        paired_bootstrap(a, b, seed=0, level=level)


def test_memory_of_the_resamples_is_bounded_and_does_not_matter(monkeypatch):
    values = np.random.default_rng(3).random(500)
    whole = bootstrap_interval(values, seed=0)
    monkeypatch.setattr(metrics, "_MOST_DRAWN", 500 * 7)
    assert bootstrap_interval(values, seed=0) == whole
