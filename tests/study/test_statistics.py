"""Statistics over seeds, against scipy's own tests, the published definition and hand computations."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from mole_jax.study.statistics import Estimate, estimate, holm, paired

A = {0: 0.41, 1: 0.44, 2: 0.39, 3: 0.47, 4: 0.42}
B = {0: 0.43, 1: 0.49, 2: 0.40, 3: 0.52, 4: 0.47}


def test_estimate_is_scipy_s_one_sample_interval():
    found = estimate(list(A.values()))
    expected = stats.ttest_1samp(list(A.values()), 0).confidence_interval(0.95)
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(np.mean(list(A.values()))), 5)
    assert found.interval == pytest.approx((expected.low, expected.high))


def test_interval_by_hand():
    # Sample standard deviation 1 of three values; t for 95 % and two degrees of freedom is 4.3027 in any table.
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert found.interval == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)


def test_figures_are_those_of_the_formulas():
    """Mean, interval and p as the t distribution gives them, for many numbers of seeds and sizes of effects."""
    rng = np.random.default_rng(1)
    for seeds in (2, 3, 5, 40):
        for effect in (0.0, 0.01, 3.0):
            values = rng.normal(effect, 0.05, seeds)
            error = values.std(ddof=1) / math.sqrt(seeds)
            reach = stats.t.ppf(0.975, seeds - 1) * error
            found = paired(dict(enumerate(values)), dict.fromkeys(range(seeds), 0.0))
            assert found is not None
            assert found.interval == pytest.approx((values.mean() - reach, values.mean() + reach))
            assert found.p == pytest.approx(2 * stats.t.sf(abs(values.mean() / error), seeds - 1), rel=1e-6)
            assert estimate(values.tolist()) == Estimate(
                pytest.approx(found.mean), pytest.approx(found.interval), seeds
            )


def test_no_spread_asks_scipy_nothing():
    """Values that are alike give no warning and no NaN, whatever their mean rounds to."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimate([0.1, 0.1, 0.1]) == Estimate(pytest.approx(0.1), pytest.approx((0.1, 0.1)), 3)


def test_few_seeds():
    assert estimate([]) is None
    assert estimate([0.3]) == Estimate(0.3, None, 1)
    assert paired({0: 0.3}, {1: 0.3}) is None
    lone = paired({0: 0.3, 1: 0.9}, {0: 0.1})
    assert lone is not None
    assert (lone.mean, lone.interval, lone.p, lone.seeds, lone.verdict) == (0.2, None, None, 1, "too few seeds")


def test_paired_is_scipy_s_paired_test():
    found = paired(A, B)
    expected = stats.ttest_rel(list(A.values()), list(B.values()))
    low, high = expected.confidence_interval(0.95)
    assert found is not None
    assert (found.p, found.interval) == (pytest.approx(expected.pvalue), pytest.approx((low, high)))
    # On the same numbers a test that ignores the pairs sees nothing.
    unpaired = stats.f_oneway(list(A.values()), list(B.values())).pvalue
    assert expected.pvalue < 0.05 < unpaired
    assert found.verdict == "below"


def test_pairs_go_by_seed_and_only_common_seeds_count():
    shuffled = {seed: B[seed] for seed in (4, 2, 0, 3, 1)}
    assert paired(A | {7: 0.9}, shuffled | {8: 0.1}) == paired(A, B)


@pytest.mark.parametrize(
    ("shift", "p", "verdict"), [(0.0, 1.0, "not told apart"), (0.1, 0.0, "above"), (-0.1, 0.0, "below")]
)
def test_differences_that_are_all_alike(shift, p, verdict):
    found = paired({seed: value + shift for seed, value in A.items()}, A)
    assert found is not None
    assert (found.p, found.verdict, found.interval) == (p, verdict, pytest.approx((shift, shift)))


def test_holm_by_hand():
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_test_that_is_not_made_yet_counts_in_the_family():
    assert holm([None, 0.01]) == [None, 0.02]


def test_holm_rejects_what_the_step_down_procedure_rejects():
    """Holm's procedure: reject the smallest p while it is below level / (number of hypotheses left)."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ps = rng.uniform(0, 0.08, 5)
        ordered = np.argsort(ps)
        passed = itertools.takewhile(lambda rank, ps=ps, o=ordered: ps[o[rank]] < 0.05 / (5 - rank), range(5))
        rejected = {int(ordered[rank]) for rank in passed}
        assert {number for number, p in enumerate(holm(ps.tolist())) if p is not None and p < 0.05} == rejected
