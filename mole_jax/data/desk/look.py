"""Every record of a mixture and of its held-out tasks, looked at once, by one process or several."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TextIO

from tqdm import tqdm

from mole_jax.data.conversation import Example
from mole_jax.data.image import image_bytes, image_size
from mole_jax.data.load import Loader, RecordProblem
from mole_jax.errors import UserError

CHUNK = 32
"""Records that a process gets at a time."""
SECONDS = 10.0
"""Between lines of progress where there is no terminal."""
Key = tuple[int, int]
"""Number of the source in the loader, and of the record in it."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of a record once it was read."""

    key: Key
    record_id: str
    reason: str = ""
    """Why it cannot be used (`mole_jax.data.load.REASONS`); empty: it can."""
    message: str = ""
    tokens: int = 0
    supervised: int = 0
    answers: int = 0
    """Turns of the assistant."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Width and height of its images, in pixels."""
    tiles: int = 0
    remarks: tuple[str, ...] = ()
    turn_dropped: bool = False
    """It begins with a turn of the assistant, which is left out."""
    content: bytes = b""
    """Hash of its turns and the content of its images; empty where it cannot be read."""

    @property
    def problem(self) -> RecordProblem:
        return RecordProblem(self.reason, self.message, self.record_id)


@dataclasses.dataclass(frozen=True)
class Look:
    """Looks at record ``key`` of a loader; of sources from number `held_out` on only at what it says."""

    loader: Loader
    held_out: int

    def __call__(self, key: Key) -> Seen:
        loader, (source, index) = self.loader, key
        try:
            if source >= self.held_out:
                example = loader.parse(source, index)
                return Seen(key, f"{example.domain}/{example.id}", content=self._content(source, example))
            loaded = loader.load(source, index)
        except RecordProblem as problem:
            return Seen(key, problem.record_id, problem.reason, str(problem))
        example, opened = loaded.example, loader.sources[source]
        rest = {"pictures": len(example.images), "max_pixels": loader.layout.max_image_pixels}
        return Seen(
            key,
            loaded.record_id,
            tokens=len(loaded.tokens),
            supervised=int(loaded.supervised.sum()),
            answers=sum(turn.role == "assistant" for turn in example.turns),
            sizes=tuple(image_size(one, opened.image_root, loader.layout.image, **rest) for one in example.images),
            tiles=len(loaded.images),
            remarks=tuple(loader.remarks(source, example)),
            turn_dropped=len(example.turns) < opened.turn_count(index),
            content=self._content(source, example),
        )

    def _content(self, source: int, example: Example) -> bytes:
        """Returns a hash of the turns, without the space around them, and of the images; empty without the images."""
        turns = [(turn.role, turn.text.strip()) for turn in example.turns]
        digest = hashlib.blake2b(json.dumps(turns).encode(), digest_size=16)
        try:
            for image in example.images:
                content = image_bytes(image, self.loader.sources[source].image_root)
                digest.update(hashlib.blake2b(content, digest_size=16).digest())
        except UserError:
            return b""
        return digest.digest()


def look_at_all(look: Look, keys: Sequence[Key], *, workers: int) -> Iterator[Seen]:
    """Yields what `look` sees of each of `keys`, in their order, by so many processes (0: this one).

    Raises:
        UserError: a process was killed.
    """
    if not workers:
        yield from map(look, keys)
        return
    method = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, method, initializer=_begin, initargs=(look,))
    try:
        for chunk in pool.map(_chunk, itertools.batched(keys, CHUNK)):
            yield from chunk
    except BrokenProcessPool:
        raise UserError(
            "a process that reads records was killed, most often for want of memory; the same command with fewer "
            "--workers needs less"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_look: Look


def _begin(look: Look) -> None:
    global _look
    _look = look


def _chunk(keys: Sequence[Key]) -> list[Seen]:
    return [_look(key) for key in keys]


def progress[T](items: Iterable[T], total: int, what: str, stream: TextIO | None = None) -> Iterator[T]:
    """Yields `items`; tells how many there were on `stream` (stderr): a bar on a terminal, else a line now and then."""
    stream = sys.__stderr__ if stream is None else stream
    if stream is not None and stream.isatty():
        yield from tqdm(items, total=total, unit=what, dynamic_ncols=True, leave=False, file=stream)
        return
    said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said > SECONDS:
            said = time.monotonic()
            print(f"{done:,} of {total:,} {what}s", file=stream, flush=True)
