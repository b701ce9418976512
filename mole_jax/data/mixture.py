"""The training mixture: domains in, packed batches out, exact to resume, the same on any number of hosts."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mole_jax.config import DataConfig, LossAverage
from mole_jax.data import counting, mixing
from mole_jax.data.batch import Batch, Row, empty_row, stack
from mole_jax.data.fingerprint import fingerprint
from mole_jax.data.left_out import ENOUGH, LeftOut, evenly
from mole_jax.data.load import Layout, Loader, RecordSource, check_room
from mole_jax.data.packing import Packer, row_of
from mole_jax.data.stream import Ledger, Reader, Stream
from mole_jax.data.tiling.pictures import row_taps
from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec, Single
from mole_jax.tokenizer import Tokenizer

STATE_VERSION = 2
CONTENT = "content"
SURVEYED, SURVEYORS = 500, 8
"""Records that `Mixture.survey` looks at, and its threads: some seconds."""
_EARLIER = {"tiling": repr(Single())}
"""What states of earlier versions do not say of themselves."""
MOST_SHARDS = 16
"""Shards without `data.shards`: as many hosts can read without reading more than their share."""


class Mixture:
    """Iterates over `Batch`.

    An epoch is as many draws as the domains that are drawn have records, after `cap` and times `repeat`
    (`examples_per_epoch`). How an epoch divides among the domains depends on `data.mix`: by `size`, each
    record comes exactly `repeat` times (for a whole `repeat`); by `weight`, a domain gets
    weight / sum of weights of the draws, whatever its size; by `temperature`, size ** (1 / temperature)
    over the sum of those. Ratios are of draws (examples), and exact; skipped records count as drawn.

    The draws are dealt out to shards, as many whatever number of hosts there is. Each shard packs its own and
    fills as many rows of every batch, the rows of shard 0 first. So the batches of a run do not depend on the
    hosts, and the place in it is that of the shards.

    With `epochs` exactly so many epochs are given out, every draw once; a shard that is done leaves its rows empty
    until all are (`count_batches`), and then all rows are. Without, it has no end.
    """

    def __init__(
        self,
        data: DataConfig,
        loader: Loader,
        *,
        seed: int,
        rows: int,
        epochs: float | None = None,
        part: int = 0,
        parts: int = 1,
    ):
        """Use `Mixture.build`."""
        self._data, self._loader, self._seed = data, loader, seed
        self._shards = shard_count(data, rows)
        self._rows_each = rows // self._shards
        begin, end = rows * part // parts, rows * (part + 1) // parts
        self._own = range(begin // self._rows_each, -(-end // self._rows_each))
        skipped_rows = self._own.start * self._rows_each
        self._keep = slice(begin - skipped_rows, end - skipped_rows)
        self._records = [len(source.records) for source in loader.sources]
        self._usable = [min(n, domain.cap or n) for n, domain in zip(self._records, data.domains, strict=True)]
        self._sizes = mixing.domain_sizes(data, self._records)
        self._shares = mixing.proportions(data, self._sizes)
        self._epochs = epochs
        self._total = None if epochs is None else round(epochs * self.examples_per_epoch)
        self._ledger = self._new_ledger()
        self._reader, self._streams = self._open(loader, self._ledger)
        self._counts = {
            shard: {name: np.zeros((), np.int64) for name in ("rows", "tiles")}
            | {name: np.zeros(len(self._records), np.int64) for name in ("examples", "tokens", "supervised")}
            for shard in self._own
        }

    @classmethod
    def build(
        cls,
        data: DataConfig,
        *,
        seed: int,
        tokenizer: Tokenizer,
        image: ImageSpec,
        rows: int,
        epochs: float | None = None,
        part: int = 0,
        parts: int = 1,
    ) -> Mixture:
        """Opens the domains of `data`.

        Args:
          data: the mixture.
          seed: of the order and the caps.
          tokenizer: of the model.
          image: how the model takes images.
          rows: rows per batch, over all hosts.
          epochs: where the mixture ends; None: nowhere.
          part, parts: it gives out the `part`-th of `parts` equal parts of every batch's rows.

        Raises:
          UserError: a domain cannot be opened, no image fits into a row, or `data.shards` does not divide the rows.
        """
        check_room(data, image)
        sources = tuple(RecordSource.open(domain) for domain in data.domains)
        layout = Layout.of(data, image, tokenizer)
        loader = Loader(sources, tokenizer, layout)
        return cls(data, loader, seed=seed, rows=rows, epochs=epochs, part=part, parts=parts)

    @property
    def examples_per_epoch(self) -> int:
        """Draws in one epoch, over all shards: sum of round(capped records * repeat) over drawn domains."""
        return mixing.epoch_examples(self._sizes, self._shares)

    @functools.cached_property
    def content(self) -> dict[str, dict[str, str]]:
        """Hashes of each domain's records and images (`mole_jax.data.fingerprint`); looks at all images once."""
        return {source.name: fingerprint(source) for source in self._loader.sources}

    @property
    def loader(self) -> Loader:
        """What reads its records."""
        return self._loader

    @property
    def shards(self) -> tuple[int, int]:
        """How many shards this part reads, and of how many."""
        return len(self._own), self._shards

    @property
    def skipped(self) -> dict[str, list[str]]:
        """Records skipped so far by reason, each once, as "domain/id: message"."""
        return self._ledger.by_reason()

    def __iter__(self) -> Mixture:
        return self

    def __next__(self) -> Batch:
        """Returns (this part of) the next batch; raises `UserError` for a record that may not be skipped."""
        rows = [self._row(stream) for stream in self._streams.values() for _ in range(self._rows_each)]
        batch = stack(rows)
        for i, shard in enumerate(self._own):
            own = slice(i * self._rows_each, (i + 1) * self._rows_each)
            self._count(shard, batch, own)
            self._counts[shard]["tiles"] += sum(row.tiles for row in rows[own])
        if self._keep == slice(0, len(batch.tokens)):
            return batch
        arrays = {name: array[self._keep] for name, array in batch.arrays().items()}
        return Batch(**arrays, record_ids=batch.record_ids[self._keep])

    def _row(self, stream: Stream) -> Row:
        layout, pad_id = self._loader.layout, self._loader.tokenizer.pad_id
        image = layout.image
        shape: dict[str, int] = {"length": layout.sequence_length, "image_slots": layout.tiles_per_row}
        if (packed := next(stream, None)) is None:
            return empty_row(**shape, image_size=image.size, pad_id=pad_id, taps=row_taps(image))
        return row_of(packed, **shape, pad_id=pad_id, tile_features=image.tile_features)

    def get_state(self) -> dict[str, Any]:
        """Returns the place after the last batch, as plain JSON values.

        It does not depend on `data.workers`. Nothing that was read ahead is in it. With several parts it is of the
        shards of this one; `merged` joins those of all.
        """
        return {
            "version": STATE_VERSION,
            "mixture": self._identity(),
            "shards": {
                str(shard): stream.get_state()
                | {"counts": {name: n.tolist() for name, n in self._counts[shard].items()}}
                for shard, stream in self._streams.items()
            },
            "skipped": self._ledger.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> str | None:
        """Goes to a place that `get_state` or `merged` gave: the batches from there on are the same, bit for bit.

        The parts may be others than those that the state comes from.

        Returns:
          What to say of a state of an older version, which does not name the content of its data; otherwise None.

        Raises:
          UserError: the state is of another mixture, or its data have changed; the message names what differs.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"data state: version {state.get('version')} is not {STATE_VERSION}; "
                "resume with the version of mole_jax that wrote the checkpoint"
            )
        saved = _EARLIER | state["mixture"]
        saved.setdefault("tiles_per_row", saved.get("images_per_row"))
        for field, value in self._identity().items():
            if field == CONTENT:
                _check_content(saved.get(field) or value, value)
            elif saved.get(field) != value:
                raise UserError(
                    f"data state: {field} was {saved.get(field)} in the checkpoint and is {value} now, so the order "
                    "cannot be continued; restore the setting or start a new run"
                )
        self._ledger.set_state(state["skipped"])
        for shard, stream in self._streams.items():
            place = state["shards"][str(shard)]
            stream.set_state(place)
            self._counts[shard] |= {name: np.array(n, np.int64) for name, n in place["counts"].items()}
        self._reader.seek({shard: state["shards"][str(shard)]["taken"] for shard in self._own})
        if CONTENT in saved:
            return None
        return "an older version has not written down the content of its data; whether they changed is not known"

    def count_batches(self) -> int:
        """Returns the exact number of batches that `epochs` make, as far as the shards of this part go.

        They are packed to be counted: every record drawn is read and tokenised, its images checked but not decoded; of
        many by several processes, whatever `data.workers` is.
        The most that any part gets is the number of batches that give out all there is.

        Raises:
          UserError: as iterating would.
        """
        assert self._total is not None, "a mixture without end has no number of batches"
        processes = counting.processes(len(self._own), round(self._total * len(self._own) / self._shards))
        if processes == 1:
            return -(-self._counted().rows // self._rows_each)
        data = dataclasses.replace(self._data, workers=0)
        loader = dataclasses.replace(self._loader, decode=False)
        of_shard = _ShardOf(data, loader, self._seed, self._shards * self._rows_each, self._epochs, self._shards)
        found = counting.counted(of_shard, self._own, processes)
        self._new_ledger().add(found.skipped)  # of which each process has seen a part
        return -(-found.rows // self._rows_each)

    def _counted(self) -> counting.Count:
        """Packs what is its own, in this process."""
        ledger = self._new_ledger()
        reader, streams = self._open(dataclasses.replace(self._loader, decode=False), ledger)
        rows, left = dict.fromkeys(streams, 0), set(streams)
        while left:
            # In turns, so that little waits in the reader that they share.
            for shard in sorted(left):
                if next(streams[shard], None) is None:
                    left.remove(shard)
                else:
                    rows[shard] += 1
        reader.close()
        return counting.Count(max(rows.values()), ledger.entries)

    def survey(self) -> list[LeftOut]:
        """Returns what will be left out of each domain that is drawn, from a look at records spread over it evenly.

        Looks at `SURVEYED` in all, at least `ENOUGH` of each domain, and at their pixels too. What stops the training
        where it is drawn is not counted.
        """
        found, most = [], max(ENOUGH, SURVEYED // len(self._records))
        for i, domain in enumerate(self._data.domains):
            if not self._shares[i]:
                continue
            chosen = mixing.chosen_records(domain, self._records[i], self._seed)
            keys = [(i, chosen[number]) for number in evenly(len(chosen), most)]
            with ThreadPoolExecutor(SURVEYORS) as pool:
                whys = [why for why in pool.map(self._why_unusable, keys) if self._ledger.skips(why)]
            found.append(LeftOut(domain.name, len(chosen), len(keys), dict(collections.Counter(whys))))
        return found

    def _why_unusable(self, key: tuple[int, int]) -> str:
        return self._loader(key)["reason"]

    def report(self, state: dict[str, Any], loss_average: LossAverage = "token") -> dict[str, Any]:
        """Returns what was handed out up to a `state` of this mixture.

        `fill_rate` is the share of positions that are not padding, in rows that are not empty; `tile_fill_rate` of
        places for tiles that have one (None: rows have no such places). For each domain:
        `records` in its file, `usable` after the cap, `read` of them so far, `share_expected` and `share_of_examples`,
        `share_of_tokens` really drawn, `share_of_loss` as `loss_average` weighs it (of the supervised tokens, or of the
        examples), `examples`, `tokens` (image positions too), `supervised_tokens`, and `skipped` records by reason.
        """
        shards = [shard["counts"] for shard in state["shards"].values()]
        examples, of_tokens, supervised = (
            np.sum([counts[name] for counts in shards], axis=0) for name in ("examples", "tokens", "supervised")
        )
        tokens, domains = int(of_tokens.sum()), {}
        weights = supervised if loss_average == "token" else examples
        drawn = mixing.drawn(sum(shard["taken"] for shard in state["shards"].values()), self._shares)
        for i, domain in enumerate(self._data.domains):
            reasons = [reason for number, _, reason, _ in state["skipped"] if number == i]
            domains[domain.name] = {
                "records": self._records[i],
                "usable": self._usable[i],
                # A pass has every record once. Shards may differ by a few draws, so this is exact only from then on.
                "read": min(self._usable[i], max(drawn[i], len(reasons))),
                "examples": int(examples[i]),
                "tokens": int(of_tokens[i]),
                "supervised_tokens": int(supervised[i]),
                "share_expected": self._shares[i] / sum(self._shares),
                "share_of_examples": int(examples[i]) / max(1, int(examples.sum())),
                "share_of_tokens": int(of_tokens[i]) / max(1, tokens),
                "share_of_loss": int(weights[i]) / max(1, int(weights.sum())),
                "skipped": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
            }
        rows = sum(counts["rows"] for counts in shards)
        tiles = sum(counts.get("tiles", 0) for counts in shards)
        return {
            "examples_per_epoch": self.examples_per_epoch,
            "loss_average": loss_average,
            "rows": rows,
            "fill_rate": tokens / max(1, rows * self._data.sequence_length),
            "tile_fill_rate": tiles / max(1, places) if (places := rows * self._data.tiles_per_row) else None,
            "domains": domains,
        }

    def close(self) -> None:
        """Stops the readers and worker processes; iterating on starts them again at the same place."""
        self._reader.close()

    def _open(self, loader: Loader, ledger: Ledger) -> tuple[Reader, dict[int, Stream]]:
        data = self._data
        elements = mixing.draws(data, self._records, self._shares, seed=self._seed).map(loader)
        reader = Reader(elements, self._own, self._shards, seed=self._seed, workers=data.workers)
        streams = {}
        for shard in self._own:
            limit = None if self._total is None else mixing.dealt(self._total, self._seed, shard, self._shards)
            packer = Packer(
                sequence_length=data.sequence_length,
                tiles_per_row=data.tiles_per_row,
                examples_per_row=data.examples_per_row,
                bins=-(-data.packing_bins // self._shards),
            )
            streams[shard] = Stream(reader, shard, ledger, packer, limit)
        return reader, streams

    def _new_ledger(self) -> Ledger:
        names = [domain.name for domain in self._data.domains]
        return Ledger(self._data.on_bad_record, self._data.on_too_long, tuple(zip(names, self._usable, strict=True)))

    def _identity(self) -> dict[str, Any]:
        """What the order of the rows depends on."""
        data, layout = self._data, self._loader.layout
        return {
            "seed": self._seed,
            "domains": [domain.name for domain in data.domains],
            "records": self._records,
            "caps": [domain.cap for domain in data.domains],
            "proportions": self._shares,
            "prompt": layout.prompt.name,
            "sequence_length": data.sequence_length,
            "examples_per_row": data.examples_per_row,
            "tiles_per_row": data.tiles_per_row,
            "packing_bins": data.packing_bins,
            "image_span": layout.image.tile_features,
            "tiling": repr(layout.image.tiling),
            "shards": self._shards,
            "examples": self._total,
            CONTENT: self.content,
        }

    def _count(self, shard: int, batch: Batch, rows: slice) -> None:
        counts = self._counts[shard]
        real, domains = batch.segment_ids[rows] > 0, batch.domain_ids[rows]
        counts["rows"] += real.any(axis=1).sum()
        for name, where in (
            ("examples", real & (batch.positions[rows] == 0)),
            ("tokens", real),
            ("supervised", batch.loss_mask[rows] > 0),
        ):
            counts[name] += np.bincount(domains[where], minlength=len(self._records))


@dataclasses.dataclass(frozen=True)
class _ShardOf:
    """Counts one shard of a mixture in another process, as the part of it that has that shard's rows."""

    data: DataConfig
    loader: Loader
    seed: int
    rows: int
    epochs: float | None
    shards: int

    def __call__(self, shard: int) -> counting.Count:
        settings: dict[str, Any] = {"seed": self.seed, "rows": self.rows, "epochs": self.epochs}
        return Mixture(self.data, self.loader, **settings, part=shard, parts=self.shards)._counted()


def _check_content(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> None:
    """Raises `UserError` for the first domain whose records or images are others than in the checkpoint."""
    for name, content in now.items():
        for part, digest in content.items():
            if before[name][part] != digest:
                raise UserError(
                    f"data state: the {part} of domain {name} have changed since the checkpoint (hash "
                    f"{before[name][part]} then, {digest} now); put them back, or start a new run in another --workdir"
                )


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the place of a run from the states of all its parts, after the same batch."""
    shards = {number: shard for state in states for number, shard in state["shards"].items()}
    skipped = {tuple(entry[:2]): entry for state in states for entry in state["skipped"]}
    return {**states[0], "shards": shards, "skipped": [skipped[key] for key in sorted(skipped)]}


def shard_count(data: DataConfig, rows: int) -> int:
    """Returns how many shards fill a batch of `rows`; raises `UserError` if `data.shards` does not divide them."""
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    if (shards := data.shards) is None:
        return max(n for n in divisors if n <= MOST_SHARDS)
    if shards not in divisors:
        near = min(divisors, key=lambda n: abs(n - shards))
        raise UserError(
            f"config: data.shards {shards} does not divide train.batch_rows {rows}; the nearest that does is {near}"
        )
    return shards
