"""Held-out sets: batches for the loss, and questions for decoding, each in the order of the file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from mole_jax.config import DataConfig, TaskConfig
from mole_jax.data.batch import Batch, Row, empty_row, single_row, stack
from mole_jax.data.conversation import Example
from mole_jax.data.load import Layout, Loader, RecordSource
from mole_jax.data.records import identified
from mole_jax.data.stream import Ledger
from mole_jax.data.template import Template
from mole_jax.data.tiling.pictures import row_taps
from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec
from mole_jax.prompts import PromptPreset
from mole_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to decode an answer for.

    `tokens` end where the answer begins: the last assistant turn is held back, earlier turns are in the prompt.
    """

    id: str
    tokens: Int[np.ndarray, " T"]
    images: UInt8[np.ndarray, "N H W 3"]
    references: tuple[str, ...]
    sources: Int[np.ndarray, "T K"] | None = None
    weights: Float[np.ndarray, "T K"] | None = None
    """As in `mole_jax.data.batch.Batch`."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is known of a question without tokenising it or reading its images."""

    id: str
    text: str
    """The last turn of the user, as the record has it."""
    references: tuple[str, ...]


class Questions(Sequence):
    """The questions of a task by number, in the order of the file; tokens and pixels are made when asked for.

    Attributes:
      listed: what is known of each.
      sha256: hash of what is asked and what is right: ids, turns, names (or bytes) of images, references.
    """

    def __init__(self, loader: Loader, total: int, suffix: str):
        """Use `questions`."""
        self._loader, self._suffix = loader, suffix
        self.listed: list[Asked] = []
        digest = hashlib.sha256()
        for index in range(total):
            example = loader.parse(0, index)
            references = self._references(index, example)
            asked = Asked(example.id, example.turns[-2].text, references)
            self.listed.append(asked)
            turns = [(turn.role, turn.text) for turn in example.turns[:-1]]
            images = [hashlib.sha256(i).hexdigest() if isinstance(i, bytes) else i for i in example.images]
            digest.update(json.dumps([example.id, turns, images, references]).encode())
        self.sha256 = digest.hexdigest()

    @property
    def prompt(self) -> PromptPreset | Template:
        """What they are asked with."""
        return self._loader.layout.prompt

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> Question:
        """Returns question `index`.

        Raises:
          UserError: the record cannot be used. Questions are never skipped, because that would change what a score
            means.
        """
        asked = self.listed[index]
        example, tokens, layouts = self._loader.question(0, index, self._suffix)
        images = self._loader.images(0, index, example, layouts)
        places = self._loader.places(tokens, layouts)
        return Question(asked.id, tokens, images, asked.references, **places)

    def _references(self, index: int, example: Example) -> tuple[str, ...]:
        """Returns the right answers that the record names, else its last turn."""
        source = self._loader.sources[0]
        raw = source.records[index]
        _, fail = identified(raw, **source.where(index))
        return source.layout.references(raw, fail) or (example.turns[-1].text,)


class HeldOut:
    """One pass over a file, one example a row, in order; iterating again starts over.

    `len()` is the number of batches: the same on every process, whatever is skipped. A record that is
    skipped leaves an empty row, and so does the end of the last batch (segment ids 0 throughout).

    Attributes:
      skipped: records skipped so far by reason, as "task/id: message".
    """

    def __init__(self, loader: Loader, ledger: Ledger, total: int, starts: range, rows: int, domain_id: int):
        """Use `held_out_batches`."""
        self._loader, self._ledger, self._total = loader, ledger, total
        self._starts, self._rows, self._domain_id = starts, rows, domain_id

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        for start in self._starts:
            rows = [self._row(index) for index in range(start, min(start + self._rows, self._total))]
            yield stack(rows + [self._empty()] * (self._rows - len(rows)))

    @property
    def remark(self) -> str:
        """Its layout, in one line (`RecordSource.remark`)."""
        return self._loader.sources[0].remark

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
            image_slots=layout.tiles_per_row,
            pad_id=self._loader.tokenizer.pad_id,
            sources=element.get("sources"),
            weights=element.get("weights"),
        )

    def _empty(self) -> Row:
        layout = self._loader.layout
        return empty_row(
            length=layout.sequence_length,
            image_slots=layout.tiles_per_row,
            image_size=layout.image.size,
            pad_id=self._loader.tokenizer.pad_id,
            taps=row_taps(layout.image),
        )


def held_out_batches(
    task: TaskConfig,
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    image: ImageSpec,
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
      tokenizer, image: as in `Mixture.build`.
      rows: rows per batch of this process.
      process_index, process_count: this process takes its turn of `rows` records, so that the batches put together
        are those of one process.

    Raises:
      UserError: the file cannot be read; while iterating, for a record that may not be skipped.
    """
    source = RecordSource.open(task)
    total = _limited(task, source)
    layout = Layout.of(data, image, tokenizer)
    names = [domain.name for domain in data.domains]
    first, step = process_index * rows, process_count * rows
    return HeldOut(
        Loader((source,), tokenizer, layout),
        Ledger(data.on_bad_record, data.on_too_long, ((task.name, total),)),
        total,
        range(first, first + total, step),
        rows=rows,
        domain_id=names.index(task.name) if task.name in names else 0,
    )


def questions(
    task: TaskConfig,
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    image: ImageSpec,
) -> Questions:
    """Opens a task's file for decoding, and reads it through once without its images.

    Raises:
      UserError: the file cannot be read or holds a broken record; or the task's suffix would not be seen.
    """
    source = RecordSource.open(task)
    layout = Layout.of(data, image, tokenizer)
    if task.suffix and isinstance(layout.prompt, PromptPreset) and layout.prompt.plain:
        raise UserError(
            f"task {task.name}: the prompt preset {layout.prompt.name} shows the model no question, so that its suffix "
            "would not be seen; leave evaluation.tasks suffix out"
        )
    return Questions(Loader((source,), tokenizer, layout), _limited(task, source), task.suffix)


def _limited(task: TaskConfig, source: RecordSource) -> int:
    total = len(source.records)
    return total if task.limit is None else min(total, task.limit)
