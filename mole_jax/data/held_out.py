"""Held-out sets: batches for the loss, and questions for decoding, each in the order of the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt8

from mole_jax.config import DataConfig, TaskConfig
from mole_jax.data.batch import Batch, Row, empty_row, single_row, stack
from mole_jax.data.load import Layout, Loader, Source
from mole_jax.data.stream import Ledger
from mole_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to decode an answer for.

    `tokens` end where the answer begins; `answer` is the last assistant turn, and earlier turns are in
    the prompt.
    """

    id: str
    tokens: Int[np.ndarray, " T"]
    images: UInt8[np.ndarray, "N H W 3"]
    answer: str


class HeldOut:
    """One pass over a file, one example a row, in order; iterating again starts over.

    `len()` is the number of batches: the same on every process, whatever is skipped. A record that is
    skipped leaves an empty row, and so does the end of the last batch (segment ids 0 throughout).

    Attributes:
      skipped: records skipped so far by reason, as "task/id: message".
    """

    def __init__(self, loader: Loader, ledger: Ledger, indices: range, batches: int, rows: int, domain_id: int):
        """Use `held_out_batches`."""
        self._loader, self._ledger, self._indices = loader, ledger, indices
        self._batches, self._rows, self._domain_id = batches, rows, domain_id

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(self._batches):
            indices = self._indices[batch * self._rows : (batch + 1) * self._rows]
            rows = [self._row(index) for index in indices]
            yield stack(rows + [self._empty()] * (self._rows - len(rows)))

    @property
    def skipped(self) -> dict[str, list[str]]:
        return self._ledger.by_reason()

    def _row(self, index: int) -> Row:
        element = self._loader((0, index))
        if not self._ledger.accept(element):
            return self._empty()
        layout = self._loader.layout
        return single_row(
            element["tokens"],
            element["supervised"],
            element["images"],
            record_id=element["record_id"],
            domain_id=self._domain_id,
            length=layout.sequence_length,
            image_slots=layout.images_per_row,
            pad_id=self._loader.tokenizer.pad_id,
        )

    def _empty(self) -> Row:
        layout = self._loader.layout
        return empty_row(
            length=layout.sequence_length,
            image_slots=layout.images_per_row,
            image_size=layout.image_size,
            pad_id=self._loader.tokenizer.pad_id,
        )


def held_out_batches(
    task: TaskConfig,
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    image_size: int,
    image_span: int,
    image_token_id: int,
    rows: int,
    process_index: int = 0,
    process_count: int = 1,
) -> HeldOut:
    """Opens a task's file for the held-out loss.

    Prompt, row size and what to do with bad and long records are those of `data`. `domain_ids` are the
    number of the domain named like the task, 0 without one.

    Args:
      task: the file; `limit` is respected.
      data: the training data's configuration.
      tokenizer, image_size, image_span, image_token_id: as in `Mixture.build`.
      rows: rows per batch of this process.
      process_index, process_count: this process takes every process_count-th record.

    Raises:
      UserError: the file cannot be read; while iterating, for a record that may not be skipped.
    """
    source = Source.open(task.name, task.path, task.image_root)
    total = _limited(task, source)
    layout = Layout.of(data, image_size=image_size, image_span=image_span, image_token_id=image_token_id)
    names = [domain.name for domain in data.domains]
    most = -(-total // process_count)
    return HeldOut(
        Loader((source,), tokenizer, layout),
        Ledger(data.on_bad_record, data.on_too_long, ((task.name, total),)),
        range(process_index, total, process_count),
        batches=-(-most // rows),
        rows=rows,
        domain_id=names.index(task.name) if task.name in names else 0,
    )


def questions(
    task: TaskConfig,
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    image_size: int,
    image_span: int,
    image_token_id: int,
) -> Iterator[Question]:
    """Opens a task's file for decoding and returns its questions, read one at a time, in order.

    Raises:
      UserError: the file cannot be read; while iterating, for a record that cannot be used. Questions
        are never skipped, because that would change what a score means.
    """
    source = Source.open(task.name, task.path, task.image_root)
    layout = Layout.of(data, image_size=image_size, image_span=image_span, image_token_id=image_token_id)
    return _questions(Loader((source,), tokenizer, layout), _limited(task, source))


def _questions(loader: Loader, total: int) -> Iterator[Question]:
    for index in range(total):
        example, tokens = loader.question(0, index)
        yield Question(example.id, tokens, loader.images(0, index, example), example.turns[-1].text)


def _limited(task: TaskConfig, source: Source) -> int:
    total = len(source.records)
    return total if task.limit is None else min(total, task.limit)
