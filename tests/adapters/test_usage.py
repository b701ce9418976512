"""Statistics of expert use: by hand, and against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from mole_jax.adapters import usage


def test_mutual_information_by_hand():
    perfect = np.diag([5.0, 70.0, 1.0])
    assert usage.mutual_information(perfect) == pytest.approx(math.log(3))
    assert usage.information_bound(perfect) == pytest.approx(math.log(3))
    alike = np.outer([1, 10, 100], [0.2, 0.3, 0.5])
    assert usage.mutual_information(alike) == pytest.approx(0, abs=1e-12)
    # Two domains, three quarters of each at an expert of its own: log 2 less the entropy of (3/4, 1/4).
    quarter = math.log(2) - (0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert usage.mutual_information(np.array([[3.0, 1.0], [25.0, 75.0]])) == pytest.approx(quarter)
    # Three domains and two experts: no more than log 2 can be known.
    assert usage.information_bound(np.ones((3, 2))) == pytest.approx(math.log(2))


def test_mutual_information_is_the_mean_divergence_from_the_mean():
    counts = np.random.default_rng(0).integers(1, 50, (4, 5, 3)).astype(float)
    shares = counts / counts.sum(axis=-1, keepdims=True)
    expected = np.mean([scipy.stats.entropy(one, shares.mean(axis=0), axis=-1) for one in shares], axis=0)
    np.testing.assert_allclose(usage.mutual_information(counts), expected)
    np.testing.assert_allclose(usage.entropy(shares), scipy.stats.entropy(shares, axis=-1))
    # A class without a token says nothing, and makes no class more.
    empty = np.concatenate([counts, np.zeros((1, 5, 3))])
    np.testing.assert_allclose(usage.mutual_information(empty), expected)
    assert usage.information_bound(np.concatenate([counts[:2], np.zeros((1, 5, 3))])) == pytest.approx(math.log(2))


def test_dead_and_collapsed_are_named_by_layer_and_expert():
    share = np.array([[0.96, 0.036, 0.004], [0.95, 0.05, 0.0], [0.4, 0.3, 0.3]])
    assert usage.collapsed_layers(share) == [(0, 0)]
    # Under a hundredth of a third.
    assert usage.dead_experts(share) == [(1, 2)]
    assert usage.dead_experts(np.array([[0.997, 0.0029]])) == [(0, 1)]
    assert usage.collapsed_layers(np.ones((2, 1))) == [], "one expert alone cannot collapse"
