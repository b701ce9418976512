"""The unit of training data: rows of packed examples as host arrays of static shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8


@dataclasses.dataclass(frozen=True)
class Row:
    """One packed row of S positions, as the packer gives it.

    The examples stand one after the other from position 0; segment ids count them from 1, 0 is padding.
    """

    tokens: Int[np.ndarray, " S"]
    supervised: Int[np.ndarray, " S"]
    """1 where the token itself is supervised."""
    positions: Int[np.ndarray, " S"]
    segment_ids: Int[np.ndarray, " S"]
    domain_ids: Int[np.ndarray, " S"]
    images: UInt8[np.ndarray, "M H W 3"]
    record_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of S positions with at most M images each.

    targets[b, t] is tokens[b, t + 1] where both are of one example (else 0), and loss_mask[b, t] is 1
    where that target is supervised. segment_ids are 1 to K within a row and 0 at padding; positions
    start again at 0 in each segment. domain_ids number the domains in the order of the configuration,
    0 at padding too. The images of a row stand in the order of their spans in it, unused ones are zero.
    """

    tokens: Int[np.ndarray, "B S"]
    targets: Int[np.ndarray, "B S"]
    loss_mask: Int[np.ndarray, "B S"]
    positions: Int[np.ndarray, "B S"]
    segment_ids: Int[np.ndarray, "B S"]
    domain_ids: Int[np.ndarray, "B S"]
    images: UInt8[np.ndarray, "B M H W 3"]
    record_ids: list[list[str]]
    """"domain/id" of each row's examples, in order; stays on the host."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays that go to the device, by field name."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "record_ids"
        }


def stack(rows: Sequence[Row]) -> Batch:
    """Returns the batch of `rows`, with targets and their mask."""
    tokens = np.stack([row.tokens for row in rows]).astype(np.int32)
    segments = np.stack([row.segment_ids for row in rows]).astype(np.int32)
    supervised = np.stack([row.supervised for row in rows])
    # The last token of an example predicts nothing, least of all the next example's first.
    same = np.zeros(segments.shape, bool)
    same[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] > 0)
    return Batch(
        tokens=tokens,
        targets=np.where(same, np.roll(tokens, -1, axis=1), 0).astype(np.int32),
        loss_mask=np.where(same, np.roll(supervised, -1, axis=1), 0).astype(np.int32),
        positions=np.stack([row.positions for row in rows]).astype(np.int32),
        segment_ids=segments,
        domain_ids=np.stack([row.domain_ids for row in rows]).astype(np.int32),
        images=np.stack([row.images for row in rows]),
        record_ids=[list(row.record_ids) for row in rows],
    )


def single_row(
    tokens: Int[np.ndarray, " T"],
    supervised: Int[np.ndarray, " T"],
    images: UInt8[np.ndarray, "N H W 3"],
    *,
    record_id: str,
    domain_id: int,
    length: int,
    image_slots: int,
    pad_id: int,
) -> Row:
    """Returns a row of S = `length` with one example in it, padded; T and N must fit."""

    def padded(values: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.concatenate([values, np.full(length - len(values), fill)]).astype(np.int32)

    size = len(tokens)
    slots = np.zeros((image_slots, *images.shape[1:]), np.uint8)
    slots[: len(images)] = images
    return Row(
        tokens=padded(tokens, pad_id),
        supervised=padded(supervised),
        positions=padded(np.arange(size)),
        segment_ids=padded(np.ones(size)),
        domain_ids=padded(np.full(size, domain_id)),
        images=slots,
        record_ids=(record_id,),
    )


def empty_row(*, length: int, image_slots: int, image_size: int, pad_id: int) -> Row:
    """Returns a row of padding only, which fills up a last batch."""
    nothing = np.zeros(0, np.int32)
    images = np.zeros((0, image_size, image_size, 3), np.uint8)
    row = single_row(
        nothing, nothing, images, record_id="", domain_id=0, length=length, image_slots=image_slots, pad_id=pad_id
    )
    return dataclasses.replace(row, record_ids=())
