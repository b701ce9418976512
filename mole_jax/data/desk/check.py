"""Inspecting a mixture before training: every problem, the counts, what is drawn, and what weighs in the loss."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mole_jax.config import DataConfig
from mole_jax.data import mixing
from mole_jax.data.colour import REMARKS
from mole_jax.data.desk.duplicates import Duplicates, duplicates
from mole_jax.data.desk.look import Key, Look, Seen, look_at_all, progress
from mole_jax.data.desk.spread import Spread, bars
from mole_jax.data.left_out import LeftOut
from mole_jax.data.load import TOO_LARGE, Loader, RecordProblem
from mole_jax.data.template import Template

MOST_EXAMPLES = 10
"""Problems of a kind that are listed; JSON has all."""


@dataclasses.dataclass(frozen=True)
class DomainCounts:
    """What a domain holds. Tokens are of usable records and count image positions."""

    name: str
    layout: str
    """Of its records, as `mole_jax.data.layouts` names it."""
    records: int
    usable: int
    images: int
    tiles: int
    """Of the images; as many where an image is one."""
    most_tiles: int
    """Of the usable record that has most."""
    turns_dropped: int
    """Records whose leading assistant turn is left out, as LLaVA does."""
    tokens: int
    supervised_tokens: int
    longest: int
    """Tokens of the longest usable record."""
    answers: Spread
    """Supervised tokens of a usable record."""
    widths: Spread
    heights: Spread
    """Of the images, in pixels."""
    longer_sides: tuple[int, ...]
    """Of each image, in pixels."""
    tiles_of_records: tuple[int, ...]
    """Tiles of each usable record that has images."""
    share: float
    """Share of the draws under data.mix."""
    drawn: int
    """Examples of an epoch, but for those of records that are left out."""
    drawn_tokens: int
    """Supervised tokens of these."""
    remarks: Mapping[str, int]
    """Images by what a user should know of them (`mole_jax.data.colour.REMARKS`)."""
    skipped: Mapping[str, int]
    """Records that training leaves out, by reason."""
    stopping: int
    """Records at which training stops."""

    @property
    def left_out(self) -> LeftOut:
        return LeftOut(self.name, self.records, self.records, self.skipped)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of reading every record of a mixture once."""

    domains: tuple[DomainCounts, ...]
    examples_per_epoch: int
    problems: tuple[RecordProblem, ...]
    """In the order of domains and records; each names file, record and field."""
    stops: bool
    """Training on this would stop with an error, or has nothing left of some domain."""
    skipped_per_epoch: int
    """Of the examples of an epoch, those of records that are left out."""
    duplicates: Duplicates
    lengths: tuple[int, ...]
    """Tokens of every usable record."""
    sequence_length: int
    remark: str | None = None
    """What a user should know of the checkpoint's chat template."""

    @property
    def loses(self) -> bool:
        """Training on this leaves records out."""
        return any(domain.skipped for domain in self.domains)

    def __str__(self) -> str:
        return "\n".join(text for text, _ in self.lines())

    def lines(self) -> list[tuple[str, bool]]:
        """Returns what there is to say, line by line, and whether a line is a warning."""
        header = f"{'domain':<20}{'records':>9}{'usable':>9}{'images':>9}{'tokens':>12}{'supervised':>12}"
        lines = [(header + f"{'longest':>9}{'share':>8}", False)]
        lines += [
            (
                f"{d.name:<20}{d.records:>9}{d.usable:>9}{d.images:>9}{d.tokens:>12}{d.supervised_tokens:>12}"
                f"{d.longest:>9}{d.share:>8.1%}",
                False,
            )
            for d in self.domains
        ]
        left_out = f", {self.skipped_per_epoch:,} of them of records that are left out"
        lines.append(
            (f"one epoch: {self.examples_per_epoch} examples{left_out if self.skipped_per_epoch else ''}", False)
        )
        lines += [(line, False) for line in self._mixture()]
        lines += [(line, False) for line in self._lengths()]
        lines += [] if self.remark is None else [(self.remark, False)]
        for domain in self.domains:
            lines += self._of_domain(domain)
        lines += self.duplicates.lines()
        lines += [(line, False) for line in self._problems()]
        return lines

    def _mixture(self) -> Iterator[str]:
        """Yields the table of what an epoch really draws, and what of the loss that is."""
        drawn, tokens = (max(1, sum(getattr(d, name) for d in self.domains)) for name in ("drawn", "drawn_tokens"))
        yield ""
        header = f"{'in an epoch':<20}{'examples':>9}{'set':>8}{'drawn':>8}{'answers':>16}"
        yield header + f"{'of the loss':>13}{'by example':>12}"
        for d in self.domains:
            answer = f"{d.answers.middle:g}, to {d.answers.most}" if d.usable else "-"
            yield (
                f"{d.name:<20}{d.drawn:>9}{d.share:>8.1%}{d.drawn / drawn:>8.1%}{answer:>16}"
                f"{d.drawn_tokens / tokens:>13.1%}{d.drawn / drawn:>12.1%}"
            )
        yield (
            "set: data.mix; answers: supervised tokens of an example, middle and most; of the loss: under "
            "train.loss_average token, and by example under example"
        )

    def _lengths(self) -> Iterator[str]:
        if not self.lengths:
            return
        too_long = sum(domain.skipped.get("too long", 0) for domain in self.domains)
        yield ""
        yield f"tokens of a record (data.sequence_length {self.sequence_length})"
        yield from bars(self.lengths, self.sequence_length)
        total = sum(domain.records for domain in self.domains)
        if too_long:
            yield f"{f'over {self.sequence_length:,}':>15}{too_long:>9} are too long, {too_long / total:.1%} of all"
        yield ""

    def _of_domain(self, domain: DomainCounts) -> Iterator[tuple[str, bool]]:
        name = domain.name
        if domain.skipped:
            yield str(domain.left_out), domain.left_out.notable
        if domain.stopping:
            yield f"{name}: training stops at {domain.stopping:,} of {domain.records:,} records", True
        if domain.turns_dropped:
            yield f"{name}: {domain.turns_dropped} records begin with an assistant turn; it is left out", False
        if domain.images:
            wide, high = domain.widths, domain.heights
            yield (
                f"{name}: images of {wide.least} to {wide.most} x {high.least} to {high.most} pixels, in the middle "
                f"{wide.middle:g} x {high.middle:g}",
                False,
            )
            yield from _histogram("longer side of an image", domain.longer_sides)
        if domain.tiles != domain.images:
            yield (
                f"{name}: {domain.tiles:,} tiles of {domain.images:,} images, {domain.most_tiles} at most "
                "of one record",
                False,
            )
            yield from _histogram("tiles of a record", domain.tiles_of_records)
        for remark, text in REMARKS.items():
            if count := domain.remarks.get(remark):
                yield f"{name}: {count} of {domain.images} images {text}", False

    def _problems(self) -> Iterator[str]:
        by_reason: dict[str, list[RecordProblem]] = {}
        for problem in self.problems:
            by_reason.setdefault(problem.reason, []).append(problem)
        for reason, found in by_reason.items():
            yield from (f"{reason}: {problem}" for problem in found[:MOST_EXAMPLES])
            if len(found) > MOST_EXAMPLES:
                yield f"{reason}: {len(found) - MOST_EXAMPLES:,} more; --json FILE writes all"
        yield f"{len(self.problems)} problem(s)" if self.problems else "no problems"

    def as_json(self) -> dict[str, Any]:
        """Returns all that was found as plain JSON values."""
        drawn, tokens = (max(1, sum(getattr(d, name) for d in self.domains)) for name in ("drawn", "drawn_tokens"))
        return {
            "examples_per_epoch": self.examples_per_epoch,
            "skipped_per_epoch": self.skipped_per_epoch,
            "stops": self.stops,
            "loses": self.loses,
            "sequence_length": self.sequence_length,
            "domains": {
                d.name: {key: value for key, value in dataclasses.asdict(d).items() if key != "name"}
                | {
                    "longer_sides": dict(collections.Counter(sorted(d.longer_sides))),
                    "tiles_of_records": dict(collections.Counter(sorted(d.tiles_of_records))),
                    "share_drawn": d.drawn / drawn,
                    "share_of_loss": {"token": d.drawn_tokens / tokens, "example": d.drawn / drawn},
                }
                for d in self.domains
            },
            "lengths": dict(collections.Counter(sorted(self.lengths))),
            "duplicates": dataclasses.asdict(self.duplicates),
            "problems": [{"reason": one.reason, "record": one.record_id, "message": str(one)} for one in self.problems],
        }


def _histogram(title: str, values: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """Yields lines of bars where there is more than one value."""
    if min(values) != max(values):
        yield title, False
        yield from ((line, False) for line in bars(values, max(values)))


def inspect(data: DataConfig, loader: Loader, *, seed: int = 0, workers: int = 0) -> Inspection:
    """Reads, tokenises and decodes every record of every domain, and lists all that is wrong.

    Args:
        data: the mixture.
        loader: of its domains; behind them may be held-out tasks, in which its records are looked for.
        seed: of the order of the draws.
        workers: processes that read; 0: this one. What is found is the same.

    Raises:
        UserError: a process was killed.
    """
    domains = len(data.domains)
    of_source = [len(source.records) for source in loader.sources]
    records = of_source[:domains]
    sizes = mixing.domain_sizes(data, records)
    shares = mixing.proportions(data, sizes)
    keys: list[Key] = [(i, index) for i, count in enumerate(of_source) for index in range(count)]
    look = look_at_all(Look(loader, domains), keys, workers=workers)
    seen = list(progress(look, len(keys), "record"))
    total = mixing.epoch_examples(sizes, shares)
    draws = _draws(data, records, shares, total, seed)
    by_domain = [list(found) for _, found in itertools.groupby(seen, key=lambda one: one.key[0])]
    counts = [_counts(data, loader, by_domain[i], draws[i], shares[i] / sum(shares)) for i in range(domains)]
    mixture = [one for found in by_domain[:domains] for one in found]
    return Inspection(
        domains=tuple(counts),
        examples_per_epoch=total,
        problems=tuple(one.problem for one in mixture if one.reason),
        stops=any(one.stopping or not one.usable for one in counts),
        skipped_per_epoch=total - sum(one.drawn for one in counts),
        duplicates=duplicates(seen, [source.name for source in loader.sources], domains),
        lengths=tuple(one.tokens for one in mixture if not one.reason),
        sequence_length=data.sequence_length,
        remark=prompt.remark if isinstance(prompt := loader.layout.prompt, Template) else None,
    )


def _draws(data: DataConfig, records: Sequence[int], shares: Sequence[int], total: int, seed: int) -> list[np.ndarray]:
    """Returns how often an epoch draws each record of each domain."""
    counts = [np.zeros(count, np.int64) for count in records]
    keys = mixing.draws(data, records, shares, seed=seed)
    for number in range(total):
        domain, index = keys[number]  # type: ignore[misc]
        counts[domain][index] += 1
    return counts


def _counts(data: DataConfig, loader: Loader, seen: Sequence[Seen], draws: np.ndarray, share: float) -> DomainCounts:
    source = loader.sources[seen[0].key[0]]
    usable = [one for one in seen if not one.reason]
    stopping = sum(_stops(data, one.reason) for one in seen)
    sizes = [size for one in usable for size in one.sizes]
    return DomainCounts(
        name=source.name,
        layout=source.layout.name,
        records=len(seen),
        usable=len(usable),
        images=len(sizes),
        tiles=sum(one.tiles for one in usable),
        most_tiles=max((one.tiles for one in usable), default=0),
        turns_dropped=sum(one.turn_dropped for one in usable),
        tokens=sum(one.tokens for one in usable),
        supervised_tokens=sum(one.supervised for one in usable),
        longest=max((one.tokens for one in usable), default=0),
        answers=Spread.of([one.supervised for one in usable]),
        widths=Spread.of([width for width, _ in sizes]),
        heights=Spread.of([height for _, height in sizes]),
        longer_sides=tuple(max(size) for size in sizes),
        tiles_of_records=tuple(one.tiles for one in usable if one.tiles),
        share=share,
        drawn=sum(int(draws[one.key[1]]) for one in usable),
        drawn_tokens=sum(int(draws[one.key[1]]) * one.supervised for one in usable),
        remarks=dict(collections.Counter(remark for one in usable for remark in one.remarks)),
        skipped=dict(collections.Counter(one.reason for one in seen if one.reason and not _stops(data, one.reason))),
        stopping=stopping,
    )


def _stops(data: DataConfig, reason: str) -> bool:
    return bool(reason) and (data.on_too_long if reason in TOO_LARGE else data.on_bad_record) == "error"
