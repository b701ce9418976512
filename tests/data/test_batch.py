"""Targets and their mask at the seams: between examples and at padding."""

from __future__ import annotations

import dataclasses

import numpy as np

from mole_jax.data.batch import empty_row, single_row, stack

SHAPE = {"length": 8, "image_slots": 1, "pad_id": 7}


def _row(tokens: list[int], supervised: list[int]):
    images = np.zeros((0, 2, 2, 3), np.uint8)
    return single_row(np.array(tokens), np.array(supervised), images, record_id="d/a", domain_id=1, **SHAPE)


def test_targets_stop_at_the_end_of_an_example():
    row = _row([3, 4, 5, 6, 8], [1, 1, 1, 1, 1])
    two = dataclasses.replace(row, segment_ids=np.array([1, 1, 2, 2, 2, 0, 0, 0]))
    batch = stack([row, two])
    assert batch.targets.tolist() == [[4, 5, 6, 8, 0, 0, 0, 0], [4, 0, 6, 8, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0]]
    assert batch.tokens.tolist() == [[3, 4, 5, 6, 8, 7, 7, 7]] * 2


def test_a_full_row_does_not_wrap_around():
    batch = stack([_row(list(range(10, 18)), [1] * 8)])
    assert batch.targets.tolist() == [[*range(11, 18), 0]]
    assert batch.loss_mask.tolist() == [[1] * 7 + [0]]


def test_an_empty_row_is_padding_only():
    batch = stack([empty_row(length=8, image_slots=1, image_size=2, pad_id=7)])
    assert batch.record_ids == [[]]
    assert batch.tokens.tolist() == [[7] * 8]
    assert not any(array.any() for name, array in batch.arrays().items() if name != "tokens")
