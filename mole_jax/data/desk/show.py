"""Examples as the model sees them, as text for a terminal."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mole_jax.config import DataConfig
from mole_jax.data import mixing
from mole_jax.data.load import TOO_LARGE, Loaded, Loader, RecordProblem
from mole_jax.errors import UserError, nearest
from mole_jax.tokenizer import Tokenizer

_ANY = 2**31 - 1


class Piece(NamedTuple):
    """A run of tokens of one kind."""

    kind: Literal["prompt", "answer", "image"]
    """An answer is supervised; an image's text says how many positions it has."""
    text: str
    over: bool
    """It lies beyond `data.sequence_length`."""


class Shown(NamedTuple):
    """A record that training would draw: what it is, where that can be said, and why it is left out, if it is."""

    loaded: Loaded | None
    problem: RecordProblem | None


def drawn(
    data: DataConfig, loader: Loader, *, seed: int, domain: str | None = None, usable: bool = False
) -> Iterator[Shown]:
    """Yields the records that training would draw, in its order and without end, of one domain or of all.

    With `usable` only those that it would use; that ends where hardly any is.

    Raises:
        UserError: there is no such domain, or it is not drawn.
    """
    records = [len(source.records) for source in loader.sources[: len(data.domains)]]
    shares = mixing.proportions(data, mixing.domain_sizes(data, records))
    names = [one.name for one, share in zip(data.domains, shares, strict=True) if share]
    if domain is not None and domain not in names:
        raise UserError(f"--domain {domain}: there is none of this name that is drawn{nearest(domain, names)}")
    keys = mixing.draws(data, records, shares, seed=seed)
    idle = 0
    for i in itertools.count():
        number, index = keys[i]  # type: ignore[misc]
        if domain is not None and data.domains[number].name != domain:
            continue
        shown = look_closely(loader, number, index)
        idle = idle + 1 if usable and shown.problem else 0
        if idle > 10 * sum(records):
            return
        if not idle:
            yield shown


def look_closely(loader: Loader, domain: int, index: int) -> Shown:
    """Returns a record; one that is too long or has too many tiles is read all the same."""
    try:
        return Shown(loader.load(domain, index), None)
    except RecordProblem as problem:
        if problem.reason not in TOO_LARGE:
            return Shown(None, problem)
        try:
            return Shown(without_limits(loader).load(domain, index), problem)
        except RecordProblem as other:  # such as a broken image of a record that is also too long
            return Shown(None, other)


def without_limits(loader: Loader) -> Loader:
    """Returns a loader for which no record is too long and none has too many tiles."""
    layout = dataclasses.replace(loader.layout, sequence_length=_ANY, tiles_per_row=_ANY)
    return dataclasses.replace(loader, layout=layout)


def preview(data: DataConfig, loader: Loader, count: int, *, seed: int) -> Iterator[str]:
    """Yields the first `count` usable examples that training would draw, as `show` writes them."""
    for one in itertools.islice(drawn(data, loader, seed=seed, usable=True), count):
        assert one.loaded is not None
        yield show(one.loaded, loader)


def told(shown: Shown, loader: Loader) -> str:
    """Returns a record as text, with the reason first where it is left out."""
    lines = [] if shown.problem is None else [f"{shown.problem.reason}: {shown.problem}"]
    lines += [] if shown.loaded is None else [show(shown.loaded, loader)]
    return "\n".join(lines)


def show(loaded: Loaded, loader: Loader) -> str:
    """Returns an example's tokens as text, supervised ones between ⟦ and ⟧, each run of image tokens as one word."""
    marks = {"prompt": "{}", "answer": "⟦{}⟧", "image": " <image: {}> "}
    parts, over = [], False
    for piece in pieces(loaded, loader):
        if piece.over and not over:
            parts.append(f" <over data.sequence_length {loader.layout.sequence_length} from here> ")
        over = piece.over
        parts.append(marks[piece.kind].format(piece.text))
    total, supervised = len(loaded.tokens), int(loaded.supervised.sum())
    images = f"{len(loaded.example.images)} image(s)"
    return f"{loaded.record_id}: {total} tokens, {supervised} supervised, {images}\n{''.join(parts)}"


def pieces(loaded: Loaded, loader: Loader) -> Iterator[Piece]:
    """Yields the tokens of an example run by run: of one kind, and on one side of the end of a row."""
    tokenizer, most = loader.tokenizer, loader.layout.sequence_length
    is_image = loaded.tokens == loader.layout.image.token_id
    kinds = np.where(is_image, 2, loaded.supervised)
    over = np.arange(len(kinds)) >= most
    # An image that begins in the row is told as a whole.
    over = np.where(is_image, False, over)
    sides = kinds + 3 * over
    starts = np.flatnonzero(np.diff(sides, prepend=-1))
    ends = [*starts[1:], len(kinds)]
    runs = iter([run for one in loaded.layouts for run in one.runs])
    for start, end in zip(starts, ends, strict=True):
        if kinds[start] == 2:
            for begin, run in _runs_of(end - start, runs):
                yield Piece("image", f"{run} positions", bool(start + begin >= most))
        else:
            text = _text(loaded.tokens[start:end].tolist(), tokenizer)
            yield Piece("answer" if kinds[start] else "prompt", text, bool(over[start]))


def _runs_of(positions: int, runs: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Yields begin and length of as many of `runs` as make up so many positions."""
    begin = 0
    while begin < positions:
        run = next(runs)
        yield begin, run
        begin += run


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
