"""Ratios, epochs, caps and the division among shards."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data import mixing
from mole_jax.errors import UserError

shares = st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any)


@given(shares=shares, periods=st.integers(1, 3))
def test_interleaving_is_exact_and_even(shares, periods):
    total = sum(shares)
    drawn = [mixing.interleave(k, shares) for k in range(periods * total)]
    for i, share in enumerate(shares):
        assert [position for parent, position in drawn if parent == i] == list(range(periods * share))
        so_far = np.cumsum([parent == i for parent, _ in drawn])
        # Rounding happens once for each sequence before this one, and less than one draw each time.
        assert np.abs(so_far - np.arange(1, len(drawn) + 1) * share / total).max() < i + 1 + 1e-9


def _data(**fields) -> DataConfig:
    domains = (
        DomainConfig("a", "-", weight=0.1, cap=40),
        DomainConfig("b", "-", weight=0.2, repeat=0.5),
        DomainConfig("c", "-", weight=0.0),
    )
    return DataConfig(domains=domains, **fields)


RECORDS = [90, 50, 9]


def test_sizes_are_after_the_cap_and_times_repeat():
    assert mixing.domain_sizes(_data(), RECORDS) == [40, 25, 9]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mix": "weight"}, [1 / 3, 2 / 3, 0]),
        ({"mix": "size"}, [40 / 74, 25 / 74, 9 / 74]),
        ({"mix": "temperature", "temperature": 1.0}, [40 / 74, 25 / 74, 9 / 74]),
        ({"mix": "temperature", "temperature": 2.0}, np.sqrt([40, 25, 9]) / np.sqrt([40, 25, 9]).sum()),
        ({"mix": "temperature", "temperature": 1e9}, [1 / 3] * 3),
    ],
)
def test_shares_of_each_mix(fields, expected):
    data = _data(**fields)
    shares = mixing.proportions(data, mixing.domain_sizes(data, RECORDS))
    np.testing.assert_allclose(np.array(shares) / sum(shares), expected, atol=1e-6)


def test_the_epoch_counts_the_domains_that_are_drawn():
    for mix, expected in (("weight", 40 + 25), ("size", 40 + 25 + 9)):
        data = _data(mix=mix)
        sizes = mixing.domain_sizes(data, RECORDS)
        assert mixing.epoch_examples(sizes, mixing.proportions(data, sizes)) == expected


def test_no_weight_at_all_is_refused():
    data = DataConfig(domains=(DomainConfig("a", "-", weight=0.0),))
    with pytest.raises(UserError, match="every weight is 0"):
        mixing.proportions(data, [3])


def _draws(data, records, count, seed=3, shard=0, shards=1):
    shares = mixing.proportions(data, mixing.domain_sizes(data, records))
    dataset = mixing.draws(data, records, shares, seed=seed)
    return [dataset[mixing.deal(i, seed, shard, shards)] for i in range(count)]


def test_by_size_an_epoch_is_each_record_as_often_as_it_repeats():
    domains = (DomainConfig("a", "-"), DomainConfig("b", "-", repeat=2), DomainConfig("one", "-"))
    data = DataConfig(domains=domains, mix="size")
    counted = collections.Counter(_draws(data, [13, 7, 1], 13 + 14 + 1))
    expected = {(0, i): 1 for i in range(13)} | {(1, i): 2 for i in range(7)} | {(2, 0): 1}
    assert counted == expected


def test_every_pass_has_another_order_and_every_seed_too():
    data = DataConfig(domains=(DomainConfig("a", "-"),))
    first, second = itertools.batched(_draws(data, [40], 80), 40)
    assert sorted(first) == sorted(second)
    assert first != second
    assert list(first) != sorted(first)
    assert _draws(data, [40], 40) == list(first)
    assert _draws(data, [40], 40, seed=4) != list(first)


def test_a_domains_order_does_not_depend_on_its_neighbours():
    alone = DataConfig(domains=(DomainConfig("a", "-"),))
    pair = DataConfig(domains=(DomainConfig("b", "-"), DomainConfig("a", "-")))
    beside = [index for domain, index in _draws(pair, [9, 20], 40) if domain == 1]
    assert beside == [index for _, index in _draws(alone, [20], 20)]


@given(total=st.integers(0, 500), shares=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
def test_how_many_are_drawn_of_each_domain_is_known_without_drawing(total, shares):
    counted = collections.Counter(mixing.interleave(i, shares)[0] for i in range(total))
    assert mixing.drawn(total, shares) == [counted[i] for i in range(len(shares))]


def test_a_cap_chooses_by_seed():
    domain = DomainConfig("a", "-", cap=10)
    chosen = [tuple(mixing.chosen_records(domain, 100, seed)) for seed in range(4)]
    assert all(len(set(one)) == 10 and max(one) < 100 for one in chosen)
    assert len(set(chosen)) == 4
    assert tuple(mixing.chosen_records(domain, 100, 0)) == chosen[0]
    assert list(mixing.chosen_records(domain, 10, 0)) == list(range(10))
    data = DataConfig(domains=(domain,))
    assert {index for _, index in _draws(data, [100], 30, seed=2)} == set(chosen[2])


@pytest.mark.parametrize("count", [2, 3])
def test_shards_divide_each_epoch(count):
    data = DataConfig(domains=(DomainConfig("a", "-"), DomainConfig("b", "-")), mix="size")
    shares = [mixing.dealt(16, 3, shard, count) for shard in range(count)]
    parts = [_draws(data, [9, 7], share, shard=shard, shards=count) for shard, share in enumerate(shares)]
    assert sum(shares) == 16
    assert max(shares) - min(shares) <= 1
    assert sorted(itertools.chain(*parts)) == [(0, i) for i in range(9)] + [(1, i) for i in range(7)]


@pytest.mark.parametrize("count", [2, 4])
def test_no_shard_gets_another_ratio(count):
    data = DataConfig(domains=tuple(DomainConfig(name, "-") for name in "abcd"))
    for shard in range(count):
        drawn = collections.Counter(domain for domain, _ in _draws(data, [500] * 4, 800, shard=shard, shards=count))
        # A fair draw deviates by 12 (one standard deviation); a fixed turn would leave domains out.
        assert all(abs(drawn[domain] - 200) < 5 * 12.3 for domain in range(4))
