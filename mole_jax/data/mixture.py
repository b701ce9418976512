"""The endless training mixture: domains in, packed batches out, exact to resume."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np

from mole_jax.config import DataConfig
from mole_jax.data import mixing
from mole_jax.data.batch import Batch, stack
from mole_jax.data.load import Layout, Loader, Source
from mole_jax.data.stream import ExampleStream, Ledger, packed, row_of
from mole_jax.data.tokenizer import Tokenizer
from mole_jax.errors import UserError

STATE_VERSION = 1


class Mixture:
    """Iterates over `Batch` without end.

    An epoch is as many draws as the domains that are drawn have records, after `cap` and times `repeat`
    (`examples_per_epoch`). How an epoch divides among the domains depends on `data.mix`: by `size`, each
    record comes exactly `repeat` times (for a whole `repeat`); by `weight`, a domain gets
    weight / sum of weights of the draws, whatever its size; by `temperature`, size ** (1 / temperature)
    over the sum of those. Ratios are of draws (examples), and exact; skipped records count as drawn.

    Packing runs across epochs: the rows of an endless stream never end with an epoch, so a run of
    `count_rows(e)` rows sees what e epochs draw, except that at its end up to `data.packing_bins` open
    rows may hold examples that a longer run would have given out next, in place of examples from
    beyond the epoch. Within the stream nothing is lost.

    With several processes each builds its own mixture with its `process_index`, and has its own state.
    """

    def __init__(
        self, data: DataConfig, loader: Loader, *, seed: int, rows: int, process_index: int, process_count: int
    ):
        """Use `Mixture.build`."""
        self._data, self._loader, self._seed, self._rows = data, loader, seed, rows
        self._process_index, self._process_count = process_index, process_count
        self._records = [len(source.records) for source in loader.sources]
        self._sizes = mixing.domain_sizes(data, self._records)
        self._shares = mixing.proportions(data, self._sizes)
        self._ledger = self._new_ledger()
        self._packer = self._pack(loader, self._ledger, process_index)
        self._reset_counts()

    @classmethod
    def build(
        cls,
        data: DataConfig,
        *,
        seed: int,
        tokenizer: Tokenizer,
        image_size: int,
        image_span: int,
        image_token_id: int,
        rows: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Mixture:
        """Opens the domains of `data`.

        Args:
          data: the mixture.
          seed: of the order, the caps and the packing.
          tokenizer: of the model.
          image_size: side of the vision tower's input, in pixels.
          image_span: positions that one image takes in a row.
          image_token_id: id at those positions.
          rows: rows per batch of this process.
          process_index, process_count: which share of the draws is this process's.

        Raises:
          UserError: a domain cannot be opened, or no image fits into a row.
        """
        if image_span >= data.sequence_length:
            raise UserError(
                f"config: data.sequence_length {data.sequence_length} has no place for an image of {image_span} "
                "positions and text; raise it"
            )
        sources = tuple(Source.open(domain.name, domain.path, domain.image_root) for domain in data.domains)
        layout = Layout.of(data, image_size=image_size, image_span=image_span, image_token_id=image_token_id)
        loader = Loader(sources, tokenizer, layout)
        return cls(data, loader, seed=seed, rows=rows, process_index=process_index, process_count=process_count)

    @property
    def examples_per_epoch(self) -> int:
        """Draws in one epoch, over all processes: sum of round(capped records * repeat) over drawn domains."""
        return mixing.epoch_examples(self._sizes, self._shares)

    @property
    def skipped(self) -> dict[str, list[str]]:
        """Records skipped so far by reason, each once, as "domain/id: message"."""
        return self._ledger.by_reason()

    def __iter__(self) -> Mixture:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch; raises `UserError` for a record that may not be skipped."""
        pad_id = self._loader.tokenizer.pad_id
        batch = stack([row_of(next(self._packer), pad_id) for _ in range(self._rows)])
        self._count(batch)
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the place after the last batch, as plain JSON values.

        It does not depend on `data.workers`. Nothing that was read ahead is in it.
        """
        return {
            "version": STATE_VERSION,
            "mixture": self._identity(),
            "packer": self._packer.get_state(),
            "skipped": self._ledger.get_state(),
            "counts": {name: values.tolist() for name, values in self._counts.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` gave: the batches from there on are the same, bit for bit.

        Raises:
          UserError: the state is of another mixture; the message names what differs.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"data state: version {state.get('version')} is not {STATE_VERSION}; "
                "resume with the version of mole_jax that wrote the checkpoint"
            )
        saved = state["mixture"]
        for field, value in self._identity().items():
            if saved.get(field) != value:
                raise UserError(
                    f"data state: {field} was {saved.get(field)} in the checkpoint and is {value} now, so the order "
                    "cannot be continued; restore the setting or start a new run"
                )
        self._ledger.set_state(state["skipped"])
        self._counts = {name: np.asarray(values, np.int64) for name, values in state["counts"].items()}
        self._restart(state["packer"])

    def count_rows(self, epochs: float) -> int:
        """Returns the exact number of rows into which `epochs` epochs are packed, by packing them.

        Every record drawn is read and tokenised, its images checked but not decoded. With several
        processes it is the smallest number any of them gets, so that all agree.

        Raises:
          UserError: as iterating would.
        """
        total = round(epochs * self.examples_per_epoch)
        loader = dataclasses.replace(self._loader, decode=False)
        counts = []
        for process in range(self._process_count):
            examples = mixing.dealt(total, self._seed, process, self._process_count)
            packer = self._pack(loader, self._new_ledger(), process, limit=examples)
            counts.append(sum(1 for _ in packer))
            packer.close()
        return min(counts)

    def report(self) -> dict[str, Any]:
        """Returns what was handed out so far, by this process.

        `fill_rate` is the share of positions that are not padding. For each domain: `records` in its
        file, `share_expected` and `share_of_examples`, `share_of_tokens` really drawn, `examples`,
        `tokens` (image positions too), `supervised_tokens`, and `skipped` records by reason.
        """
        counts, names = self._counts, [domain.name for domain in self._data.domains]
        tokens = int(counts["tokens"].sum())
        domains = {}
        for i, name in enumerate(names):
            entries = [reason for (domain, _), (reason, _) in self._ledger.entries.items() if domain == i]
            domains[name] = {
                "records": self._records[i],
                "examples": int(counts["examples"][i]),
                "tokens": int(counts["tokens"][i]),
                "supervised_tokens": int(counts["supervised"][i]),
                "share_expected": self._shares[i] / sum(self._shares),
                "share_of_examples": int(counts["examples"][i]) / max(1, int(counts["examples"].sum())),
                "share_of_tokens": int(counts["tokens"][i]) / max(1, tokens),
                "skipped": {reason: entries.count(reason) for reason in dict.fromkeys(entries)},
            }
        rows = int(counts["rows"][0])
        return {
            "examples_per_epoch": self.examples_per_epoch,
            "rows": rows,
            "fill_rate": tokens / max(1, rows * self._data.sequence_length),
            "domains": domains,
        }

    def close(self) -> None:
        """Stops the readers and worker processes; iterating on starts them again at the same place."""
        self._restart(self._packer.get_state())

    def _restart(self, place: dict[str, Any]) -> None:
        self._packer.close()
        self._packer = self._pack(self._loader, self._ledger, self._process_index)
        self._packer.set_state(place)

    def _pack(self, loader: Loader, ledger: Ledger, process: int, limit: int | None = None) -> grain.DatasetIterator:
        data = self._data
        keys = mixing.draws(
            data,
            self._records,
            self._shares,
            seed=self._seed,
            process_index=process,
            process_count=self._process_count,
        )
        if limit is not None:
            keys = keys.slice(slice(0, limit))
        return packed(
            ExampleStream(keys.map(loader), ledger.accept, data.workers),
            sequence_length=data.sequence_length,
            images_per_row=data.images_per_row,
            examples_per_row=data.examples_per_row,
            bins=data.packing_bins,
            seed=self._seed,
        )

    def _new_ledger(self) -> Ledger:
        usable = [min(n, domain.cap or n) for n, domain in zip(self._records, self._data.domains, strict=True)]
        names = [domain.name for domain in self._data.domains]
        return Ledger(self._data.on_bad_record, self._data.on_too_long, tuple(zip(names, usable, strict=True)))

    def _identity(self) -> dict[str, Any]:
        """What the order of the rows depends on."""
        data, layout = self._data, self._loader.layout
        return {
            "seed": self._seed,
            "domains": [domain.name for domain in data.domains],
            "records": self._records,
            "caps": [domain.cap for domain in data.domains],
            "proportions": self._shares,
            "prompt": data.prompt,
            "sequence_length": data.sequence_length,
            "examples_per_row": data.examples_per_row,
            "images_per_row": data.images_per_row,
            "packing_bins": data.packing_bins,
            "image_span": layout.image_span,
            "process_index": self._process_index,
            "process_count": self._process_count,
        }

    def _reset_counts(self) -> None:
        zeros = np.zeros(len(self._records), np.int64)
        self._counts = {name: zeros.copy() for name in ("examples", "tokens", "supervised")}
        self._counts["rows"] = np.zeros(1, np.int64)

    def _count(self, batch: Batch) -> None:
        real, domains = batch.segment_ids > 0, len(self._records)
        self._counts["rows"] += len(batch.tokens)
        for name, where in (
            ("examples", real & (batch.positions == 0)),
            ("tokens", real),
            ("supervised", batch.loss_mask > 0),
        ):
            self._counts[name] += np.bincount(batch.domain_ids[where], minlength=domains)
