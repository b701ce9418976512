"""Inspecting a mixture before training: every problem, the counts, and what is supervised."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mole_jax.config import DataConfig
from mole_jax.data import mixing
from mole_jax.data.colour import REMARKS
from mole_jax.data.left_out import LeftOut
from mole_jax.data.load import TOO_LARGE, Layout, Loaded, Loader, RecordProblem, RecordSource
from mole_jax.data.template import Template
from mole_jax.image_spec import ImageSpec
from mole_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class DomainCounts:
    """What a domain holds. Tokens are of usable records and count image positions."""

    name: str
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
    share: float
    """Share of the draws under data.mix."""
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
    skipped_per_epoch: float
    """Of the examples of an epoch, those of records that are left out."""
    remark: str | None = None
    """What a user should know of the checkpoint's chat template."""

    def __str__(self) -> str:
        return "\n".join(text for text, _ in self.lines())

    def lines(self) -> list[tuple[str, bool]]:
        """Returns what there is to say, line by line, and whether a line says that much is left out."""
        header = f"{'domain':<20}{'records':>9}{'usable':>9}{'images':>9}{'tokens':>12}{'supervised':>12}"
        lines = [header + f"{'longest':>9}{'share':>8}"]
        lines += [
            f"{d.name:<20}{d.records:>9}{d.usable:>9}{d.images:>9}{d.tokens:>12}{d.supervised_tokens:>12}"
            f"{d.longest:>9}{d.share:>8.1%}"
            for d in self.domains
        ]
        left_out = f", about {self.skipped_per_epoch:,.0f} of them of records that are left out"
        lines.append(f"one epoch: {self.examples_per_epoch} examples{left_out if self.skipped_per_epoch else ''}")
        lines += [] if self.remark is None else [self.remark]
        notable = {str(domain.left_out) for domain in self.domains if domain.left_out.notable}
        for domain in self.domains:
            if domain.skipped:
                lines.append(str(domain.left_out))
            if domain.stopping:
                lines.append(f"{domain.name}: training stops at {domain.stopping:,} of {domain.records:,} records")
            if domain.turns_dropped:
                lines.append(
                    f"{domain.name}: {domain.turns_dropped} records begin with an assistant turn; it is left out"
                )
            if domain.tiles != domain.images:
                lines.append(
                    f"{domain.name}: {domain.tiles:,} tiles of {domain.images:,} images, {domain.most_tiles} at most "
                    "of one record"
                )
            for remark, text in REMARKS.items():
                if count := domain.remarks.get(remark):
                    lines.append(f"{domain.name}: {count} of {domain.images} images {text}")
        lines += [f"{problem.reason}: {problem}" for problem in self.problems]
        lines.append(f"{len(self.problems)} problem(s)" if self.problems else "no problems")
        return [(line, line in notable) for line in lines]


def open_loader(data: DataConfig, tokenizer: Tokenizer, image: ImageSpec) -> Loader:
    """Opens the domains of `data` for inspection; raises `UserError` if one cannot be opened."""
    sources = tuple(RecordSource.open(domain) for domain in data.domains)
    layout = Layout.of(data, image, tokenizer)
    return Loader(sources, tokenizer, layout)


def inspect(data: DataConfig, loader: Loader) -> Inspection:
    """Reads, tokenises and decodes every record of every domain, and lists all that is wrong."""
    records = [len(source.records) for source in loader.sources]
    sizes = mixing.domain_sizes(data, records)
    shares = mixing.proportions(data, sizes)
    counts, problems = [], []
    for i, source in enumerate(loader.sources):
        usable = images = tiles = most_tiles = tokens = supervised = longest = dropped = 0
        remarks, skipped, stopping = collections.Counter(), collections.Counter(), 0
        for index in range(records[i]):
            try:
                loaded = loader.load(i, index)
            except RecordProblem as problem:
                problems.append(problem)
                stops = _stops(data, problem)
                stopping += stops
                skipped.update([] if stops else [problem.reason])
                continue
            usable += 1
            images += len(loaded.example.images)
            tiles += len(loaded.images)
            most_tiles = max(most_tiles, len(loaded.images))
            remarks.update(loader.remarks(i, loaded.example))
            tokens += len(loaded.tokens)
            supervised += int(loaded.supervised.sum())
            longest = max(longest, len(loaded.tokens))
            dropped += len(loaded.example.turns) < len(source.records[index]["conversations"])
        share = shares[i] / sum(shares)
        counts.append(
            DomainCounts(
                name=source.name,
                records=records[i],
                usable=usable,
                images=images,
                tiles=tiles,
                most_tiles=most_tiles,
                turns_dropped=dropped,
                tokens=tokens,
                supervised_tokens=supervised,
                longest=longest,
                share=share,
                remarks=dict(remarks),
                skipped=dict(skipped),
                stopping=stopping,
            )
        )
    return Inspection(
        tuple(counts),
        mixing.epoch_examples(sizes, shares),
        tuple(problems),
        any(domain.stopping or not domain.usable for domain in counts),
        sum(size * one.left_out.share for size, one, share in zip(sizes, counts, shares, strict=True) if share),
        prompt.remark if isinstance(prompt := loader.layout.prompt, Template) else None,
    )


def preview(data: DataConfig, loader: Loader, count: int, *, seed: int) -> Iterator[str]:
    """Yields the first `count` usable examples that training would draw, as `show` writes them."""
    records = [len(source.records) for source in loader.sources]
    shares = mixing.proportions(data, mixing.domain_sizes(data, records))
    keys = mixing.draws(data, records, shares, seed=seed)
    shown = 0
    for i in itertools.count():
        # Where hardly anything is usable, looking on would never end.
        if shown == count or i >= 10 * (count + sum(records)):
            return
        try:
            domain, index = keys[i]  # type: ignore[misc]
            loaded = loader.load(domain, index)
        except RecordProblem:
            continue
        shown += 1
        yield show(loaded, loader)


def show(loaded: Loaded, loader: Loader) -> str:
    """Returns an example's tokens as text, supervised ones between ⟦ and ⟧, each run of image tokens as one word."""
    tokenizer, layout = loader.tokenizer, loader.layout
    is_image = loaded.tokens == layout.image.token_id
    # Runs of tokens of one kind; kind 2 is an image.
    kinds = np.where(is_image, 2, loaded.supervised)
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    ends = [*starts[1:], len(kinds)]
    parts, runs = [], iter([run for one in loaded.layouts for run in one.runs])
    for start, end in zip(starts, ends, strict=True):
        if kinds[start] == 2:
            parts += _runs_of(end - start, runs)
        else:
            text = _text(loaded.tokens[start:end].tolist(), tokenizer)
            parts.append(f"⟦{text}⟧" if kinds[start] else text)
    total, supervised = len(loaded.tokens), int(loaded.supervised.sum())
    images = f"{len(loaded.example.images)} image(s)"
    return f"{loaded.record_id}: {total} tokens, {supervised} supervised, {images}\n{''.join(parts)}"


def _runs_of(positions: int, runs: Iterator[int]) -> Iterator[str]:
    """Yields words for as many of `runs` as make up so many positions."""
    while positions > 0:
        run = next(runs)
        yield f" <image: {run} positions> "
        positions -= run


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Decodes with special tokens written out, which `decode` leaves away."""
    text, run = "", []
    for i in [*ids, None]:
        if i is not None and not tokenizer.is_special(i):
            run.append(i)
            continue
        text += tokenizer.decode(run)
        run = []
        if i is not None:
            text += tokenizer.token(i) or f"<{i}>"
    return text


def _stops(data: DataConfig, problem: RecordProblem) -> bool:
    return (data.on_too_long if problem.reason in TOO_LARGE else data.on_bad_record) == "error"
