"""The batches of a run do not depend on how many processes share the reading, before and after a resume."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest

from mole_jax.config import DataConfig
from mole_jax.data.mixture import merged
from mole_jax.errors import UserError
from tests.data.domains_on_disk import build, domain


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("domains")
    domains = (
        domain(folder, "photos", 9, weight=2.0),
        domain(folder, "charts", 5),
        domain(folder, "text", 4, image=False),
    )
    return DataConfig(
        domains=domains, sequence_length=400, examples_per_row=4, tiles_per_row=3, packing_bins=3, mix="weight"
    )


def test_parts_of_any_number_make_the_batches_of_one(data, tokenizer):
    """Twelve rows of four shards: parts that hold whole shards, that share one, and that hold pieces of two."""
    data = dataclasses.replace(data, shards=4)
    whole = build(data, tokenizer, rows=12)
    batches = [next(whole) for _ in range(3)]
    for parts, shards in ((2, [2, 2]), (3, [2, 2, 2]), (6, [1, 2, 1, 1, 2, 1])):
        mixtures = [build(data, tokenizer, rows=12, part=part, parts=parts) for part in range(parts)]
        assert [mixture.shards[0] for mixture in mixtures] == shards, "each reads the shards of its rows and no others"
        for batch in batches:
            pieces = [next(mixture) for mixture in mixtures]
            for name, array in batch.arrays().items():
                np.testing.assert_array_equal(np.concatenate([piece.arrays()[name] for piece in pieces]), array)
            assert [row for piece in pieces for row in piece.record_ids] == batch.record_ids
        state = merged([mixture.get_state() for mixture in mixtures])
        assert state == whole.get_state()


def test_an_epoch_goes_on_exactly_with_another_number_of_parts(data, tokenizer):
    """Four parts, then one, then three, then two: no record of the epoch is lost and none comes twice."""
    data = dataclasses.replace(data, mix="size")
    whole = build(data, tokenizer, rows=6, epochs=3)
    total = whole.count_batches()
    assert total >= 4
    state, names, position = None, collections.Counter(), 0
    for parts, batches in ((6, 1), (1, 1), (3, 1), (2, total - 3)):
        mixtures = [build(data, tokenizer, rows=6, epochs=3, part=part, parts=parts) for part in range(parts)]
        assert max(mixture.count_batches() for mixture in mixtures) == total
        for mixture in mixtures:
            if state is not None:
                mixture.set_state(state)
        for _ in range(batches):
            pieces = [next(mixture) for mixture in mixtures]
            rows = [row for piece in pieces for row in piece.record_ids]
            assert rows == next(whole).record_ids
            names.update(name for row in rows for name in row)
            position += 1
        state = json.loads(json.dumps(merged([mixture.get_state() for mixture in mixtures])))
        for mixture in mixtures:
            mixture.close()
    assert len(names) == 9 + 5 + 4
    assert set(names.values()) == {3}
    assert whole.report(state) == whole.report(whole.get_state())
    assert {name: one["examples"] for name, one in whole.report(state)["domains"].items()} == {
        "photos": 27,
        "charts": 15,
        "text": 12,
    }


def test_shards_that_do_not_divide_the_rows_are_refused(data, tokenizer):
    with pytest.raises(UserError, match=r"data\.shards 5 does not divide train\.batch_rows 12; .* is 4$"):
        build(dataclasses.replace(data, shards=5), tokenizer, rows=12)
