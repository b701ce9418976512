"""The packer: within the three limits of a row, nothing lost or kept waiting, and fuller than without choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_jax.data.packing import PATIENCE, Packer

S, M, K = 100, 3, 5


def example(tokens: int, images: int = 0) -> dict:
    return {"tokens": np.zeros(tokens), "images": np.zeros((images, 1))}


def pack(examples, bins, length=S):
    """Returns the rows given out in order, each with the number of rows given before it, and those left open."""
    packer = Packer(sequence_length=length, tiles_per_row=M, examples_per_row=K, bins=bins)
    rows = []
    for number, one in enumerate(examples):
        if (row := packer.add(number, one)) is not None:
            rows.append(row)
        assert len(packer.open) <= bins
    return rows, packer


@given(sizes=st.lists(st.tuples(st.integers(1, S), st.integers(0, M)), max_size=60), bins=st.integers(1, 4))
def test_of_any_stream_every_example_is_in_one_row_that_holds_it(sizes, bins):
    examples = [example(*size) for size in sizes]
    rows, packer = pack(examples, bins)
    given_out = len(rows)
    while (row := packer.give()) is not None:
        rows.append(row)
    assert packer.given == len(rows)
    assert sorted(number for row in rows for number, _ in row.examples) == list(range(len(sizes)))
    for when, row in enumerate(rows):
        held = [one for _, one in row.examples]
        assert 1 <= len(held) <= K
        assert row.tokens == sum(len(one["tokens"]) for one in held) <= S
        assert row.tiles == sum(len(one["images"]) for one in held) <= M
        # Late rows go out one at a time, and at most `bins` are late together.
        assert when >= given_out or when - row.opened <= (PATIENCE + 1) * bins


@pytest.mark.parametrize("odd", [example(55), example(3, M)])
def test_an_odd_example_is_not_kept_back_for_ever(odd):
    """Nothing that comes after it fits beside it, and by tokens its row is never the fullest."""
    rest = [example(60 + 10 * (i % 3 > 0), 1) for i in range(60 * PATIENCE)]
    rows, _ = pack([odd, *rest], bins=4)
    assert any(number == 0 for row in rows for number, _ in row.examples)


def test_choice_among_four_rows_fills_better_than_none():
    """Lengths as LLaVA's: an image of 576 positions with a log-normal text, or text alone."""
    rng = np.random.default_rng(0)
    images = rng.random(4000) < 0.85
    tokens = np.minimum(576 * images + np.exp(rng.normal(5.2, 0.8, 4000)).astype(int) + 40, 2048)
    fill = {}
    for bins in (1, 4):
        rows, _ = pack([example(*size) for size in zip(tokens, images.astype(int), strict=True)], bins, length=2048)
        fill[bins] = np.mean([row.tokens for row in rows]) / 2048
    assert fill[4] > fill[1] + 0.05
