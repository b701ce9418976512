"""Which record comes when: the shares of the domains, their epoch, and the endless order of draws."""

from __future__ import annotations

import hashlib
import math
import sys
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.errors import UserError


def domain_sizes(data: DataConfig, records: Sequence[int]) -> list[int]:
    """Returns each domain's size: its records after the cap, times `repeat`, rounded, at least 1."""
    capped = [min(n, domain.cap or n) for n, domain in zip(records, data.domains, strict=True)]
    return [max(1, round(n * domain.repeat)) for n, domain in zip(capped, data.domains, strict=True)]


def proportions(data: DataConfig, sizes: Sequence[int]) -> list[int]:
    """Returns whole numbers in the ratio in which the domains are drawn, without common divisor.

    Raises:
      UserError: every share is 0.
    """
    if data.mix == "weight":
        # By their decimal notation, so that 0.1 and 0.2 are 1 : 2 exactly.
        shares = [Fraction(repr(float(domain.weight))) for domain in data.domains]
    elif data.mix == "size":
        shares = [Fraction(size) for size in sizes]
    else:
        shares = [Fraction(max(1, round(size ** (1 / data.temperature) * 10**6)), 10**6) for size in sizes]
    if not any(shares):
        raise UserError("config: data.domains: every weight is 0; give one a weight over 0")
    scale = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * scale) for share in shares]
    divisor = math.gcd(*whole)
    return [number // divisor for number in whole]


def epoch_examples(sizes: Sequence[int], shares: Sequence[int]) -> int:
    """Returns the number of examples in one pass: the sizes of all domains that are drawn at all."""
    return sum(size for size, share in zip(sizes, shares, strict=True) if share)


def chosen_records(domain: DomainConfig, records: int, seed: int) -> Sequence[int]:
    """Returns the indices that a domain uses: all, or `cap` of them chosen by the seed."""
    if domain.cap is None or domain.cap >= records:
        return range(records)
    generator = np.random.default_rng(_seed(seed, domain.name, "cap"))
    return sorted(generator.choice(records, domain.cap, replace=False).tolist())


def draws(data: DataConfig, records: Sequence[int], shares: Sequence[int], *, seed: int) -> grain.MapDataset:
    """Returns the endless sequence of draws, each a (domain, record).

    Every domain is shuffled anew in each of its passes.
    """
    parents = []
    for domain, count in zip(data.domains, records, strict=True):
        order = grain.MapDataset.source(chosen_records(domain, count, seed))
        parents.append(order.shuffle(seed=_seed(seed, domain.name, "order")).repeat())
    return _Mixed(parents, shares)


class _Mixed(grain.MapDataset):
    """Interleaves endless datasets evenly, by whole-number proportions, as (parent, element).

    grain's own `mix` cuts the ratios to about one percent; this one is exact over `sum(shares)` draws.
    """

    def __init__(self, parents: Sequence[grain.MapDataset], shares: Sequence[int]):
        super().__init__(parents)
        self._orders: list[Any] = list(parents)
        self._shares = tuple(shares)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        parent, position = interleave(index, self._shares)
        return parent, self._orders[parent][position]


def deal(index: int, seed: int, shard: int, shards: int) -> int:
    """Returns which draw is the `index`-th of a shard.

    Draws are dealt out in rounds, each beginning at another shard, chosen by the seed. Dealing them in
    a fixed turn would give one shard only one domain where their number fits (two domains of equal
    weight and two shards).
    """
    if shards == 1:
        return index
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return index * shards + (shard + int.from_bytes(digest)) % shards


def dealt(total: int, seed: int, shard: int, shards: int) -> int:
    """Returns how many of the first `total` draws a shard gets."""
    rounds = total // shards
    return rounds + (deal(rounds, seed, shard, shards) < total)


def interleave(index: int, shares: Sequence[int]) -> tuple[int, int]:
    """Returns (sequence, position in it) of element `index` of the even interleaving of sequences.

    Of the first k elements, the first sequence gets k * share / total rounded up; the rest is divided
    among the others in the same way.
    """
    before, after = index, index + 1
    remaining = sum(shares)
    for sequence, share in enumerate(shares):
        others_before = before * (remaining - share) // remaining
        others_after = after * (remaining - share) // remaining
        if others_before == others_after and share:
            return sequence, before - others_before
        before, after, remaining = others_before, others_after, remaining - share
    raise AssertionError("some sequence has the last share")


def drawn(total: int, shares: Sequence[int]) -> list[int]:
    """Returns how many of the first `total` elements of the even interleaving come from each sequence."""
    counts, left, remaining = [], total, sum(shares)
    for share in shares:
        others = left * (remaining - share) // remaining if remaining else left
        counts.append(left - others)
        left, remaining = others, remaining - share
    return counts


def _seed(seed: int, name: str, purpose: str) -> int:
    # By name, so that another domain beside it does not change a domain's order.
    return zlib.crc32(f"{seed}/{name}/{purpose}".encode())
