"""Means over seeds, differences between arms on the same seeds, and how sure both are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Of every interval; a test at this level calls p below 1 - LEVEL a difference."""
Series = Mapping[int, float]
"""A value for each seed."""
_DIGITS = 12
"""Decimals of a difference that count: 0.3 and 0.1 + 0.2 do not differ."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds; its interval is None where one seed allows none."""

    mean: float
    interval: tuple[float, float] | None
    seeds: int


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """A mean of differences by seed, and the two-sided p of its t-test; p is None where one seed allows none."""

    p: float | None

    @property
    def verdict(self) -> str:
        """What the difference says without any correction."""
        return verdict(self.mean, self.p)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Returns the mean of one value a seed with its 95 % Student-t interval; None of no values."""
    found = _t_test(values)
    return None if found is None else Estimate(found.mean, found.interval, found.seeds)


def paired(a: Series, b: Series) -> Difference | None:
    """Tests whether `a` and `b` differ, seed by seed (Student's paired t-test, two-sided).

    Seeds that only one of them has are left out; `seeds` of the result says how many are not.

    Returns:
        The mean of a - b, its 95 % interval and p; None where they share no seed. Differences that are all zero have
        p 1, all alike and not zero p 0.
    """
    return _t_test([round(a[seed] - b[seed], _DIGITS) for seed in a if seed in b])


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Corrects the p of a family of tests for their number (Holm 1979, Scand. J. Statist. 6, 65-70).

    A test that could not be made yet (None) still belongs to the family, so that its result cannot make the others'
    worse later.
    """
    corrected: list[float | None] = [None] * len(ps)
    least = 0.0
    for rank, number in enumerate(sorted(range(len(ps)), key=lambda number: _or_one(ps[number]))):
        least = max(least, min(1.0, (len(ps) - rank) * _or_one(ps[number])))
        corrected[number] = None if ps[number] is None else least
    return corrected


def verdict(difference: float, p: float | None) -> str:
    """Returns "above", "below", "not told apart", or "too few seeds" where there was no test."""
    if p is None:
        return "too few seeds"
    if p >= 1 - LEVEL:
        return "not told apart"
    return "above" if difference > 0 else "below"


def _t_test(values: Sequence[float]) -> Difference | None:
    """Tests whether the mean of `values` is zero; None of no values."""
    if not len(values):
        return None
    mean = float(np.mean(values))
    if len(values) == 1:
        return Difference(mean, None, 1, None)
    if min(values) == max(values):
        # scipy's statistic is a division by zero where there is no spread.
        return Difference(mean, (mean, mean), len(values), 0.0 if mean else 1.0)
    found = stats.ttest_1samp(values, 0.0)
    low, high = found.confidence_interval(LEVEL)
    p = float(found.pvalue)  # pyright: ignore[reportAttributeAccessIssue] # scipy names this field at run time
    return Difference(mean, (float(low), float(high)), len(values), p)


def _or_one(p: float | None) -> float:
    return 1.0 if p is None else p
