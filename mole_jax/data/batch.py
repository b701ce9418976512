"""The unit of training data: rows of packed examples as host arrays of static shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8


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
    tiles: int
    """How many of the M are used."""
    sources: Int[np.ndarray, "S K"] | None = None
    weights: Float[np.ndarray, "S K"] | None = None
    """As in `Batch`."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of S positions with at most M tiles of images each.

    targets[b, t] is tokens[b, t + 1] where both are of one example (else 0), and loss_mask[b, t] is 1
    where that target is supervised. segment_ids are 1 to K within a row and 0 at padding; positions
    start again at 0 in each segment. domain_ids number the domains in the order of the configuration,
    0 at padding too. The tiles of a row stand in the order of their images in it, unused ones are zero.

    Of models for which an image is one tile, the image tokens of a row receive the features of its tiles in order, and
    `sources` and `weights` are None. Of others (F features a tile, `ImageSpec.tile_features`) position t of row b
    receives the sum over k of weights[b, t, k] times feature sources[b, t, k] of the row's M F features, tile after
    tile; -1 is the learned newline. Weights are 0 where no image is.
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
    sources: Int[np.ndarray, "B S K"] | None = None
    weights: Float[np.ndarray, "B S K"] | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays that go to the device, by field name; not those that are None."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: array for name, array in arrays.items() if name != "record_ids" and array is not None}


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
        sources=_stacked([row.sources for row in rows]),
        weights=_stacked([row.weights for row in rows]),
    )


def _stacked(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    there = [one for one in arrays if one is not None]
    return np.stack(there) if there else None


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
    sources: Int[np.ndarray, "T K"] | None = None,
    weights: Float[np.ndarray, "T K"] | None = None,
) -> Row:
    """Returns a row of S = `length` with one example in it, padded; T and N must fit."""
    size = len(tokens)
    slots = np.zeros((image_slots, *images.shape[1:]), np.uint8)
    slots[: len(images)] = images
    return Row(
        tokens=padded(tokens, length, pad_id),
        supervised=padded(supervised, length),
        positions=padded(np.arange(size), length),
        segment_ids=padded(np.ones(size), length),
        domain_ids=padded(np.full(size, domain_id), length),
        images=slots,
        record_ids=(record_id,),
        tiles=len(images),
        sources=None if sources is None else padded(sources, length),
        weights=None if weights is None else padded(weights, length, kind=np.float32),
    )


def padded(values: np.ndarray, length: int, fill: int = 0, kind: type = np.int32) -> np.ndarray:
    """Returns `values` as an array of `length` and `kind`, filled up."""
    rest = np.full((length - len(values), *values.shape[1:]), fill)
    return np.concatenate([values, rest]).astype(kind)


def empty_row(*, length: int, image_slots: int, image_size: int, pad_id: int, taps: int | None = None) -> Row:
    """Returns a row of padding only, which fills up a last batch; `taps` is K where rows have `sources`."""
    nothing = np.zeros(0, np.int32)
    images = np.zeros((0, image_size, image_size, 3), np.uint8)
    places = {} if taps is None else dict.fromkeys(("sources", "weights"), np.zeros((0, taps)))
    row = single_row(
        nothing,
        nothing,
        images,
        record_id="",
        domain_id=0,
        length=length,
        image_slots=image_slots,
        pad_id=pad_id,
        **places,
    )
    return dataclasses.replace(row, record_ids=())
