"""Records that are there more than once: within a domain, in two domains, or in a held-out task too."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from mole_jax.data.desk.look import Seen
from mole_jax.terminal import shortened

SHOWN = 5
"""Records that a line names."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """Records of `first` whose turns and images are also those of a record of `second`, by their names there."""

    first: str
    second: str
    records: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        pairs = ", ".join(f"{shortened(a)} = {shortened(b)}" for a, b in self.records[:SHOWN])
        return f"({pairs}{', …' if len(self.records) > SHOWN else ''})"


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Records of equal content: turns but for the space around them, and the files of images byte for byte."""

    within: tuple[Shared, ...]
    """In one domain, each with the first of its like."""
    across: tuple[Shared, ...]
    """In two domains."""
    leaks: tuple[Shared, ...]
    """In a domain and a held-out task, whose score then says nothing."""

    def lines(self) -> list[tuple[str, bool]]:
        """Returns what to say, and whether it is a warning."""
        lines = [
            (f"{one.first}: {len(one.records):,} records are copies of others {one}", False) for one in self.within
        ]
        lines += [
            (f"{one.first}: {len(one.records):,} records are in {one.second} too {one}", False) for one in self.across
        ]
        return lines + [
            (
                f"leak: {len(one.records):,} records of {one.first} are in the held-out task {one.second} {one}; take "
                "them out of one of the two",
                True,
            )
            for one in self.leaks
        ]


def duplicates(seen: Iterable[Seen], names: Sequence[str], domains: int) -> Duplicates:
    """Finds records of equal content; of sources by number, those from `domains` on are held-out tasks."""
    alike: dict[bytes, list[Seen]] = {}
    for one in seen:
        if one.content:
            alike.setdefault(one.content, []).append(one)
    pairs: dict[tuple[int, int], list[tuple[str, str]]] = collections.defaultdict(list)
    for group in alike.values():
        firsts: dict[int, Seen] = {}
        for one in group:
            source = one.key[0]
            for other, first in firsts.items():
                # Among tasks alone it is no matter; of copies in a domain the first stands for all elsewhere.
                if other < domains and (other == source or source not in firsts):
                    pairs[other, source].append((first.record_id, one.record_id))
            firsts.setdefault(source, one)
    found = {
        kind: tuple(
            Shared(names[a], names[b], tuple(pairs[a, b])) for a, b in sorted(pairs) if _kind(a, b, domains) == kind
        )
        for kind in ("within", "across", "leaks")
    }
    return Duplicates(**found)


def _kind(first: int, second: int, domains: int) -> str:
    return "leaks" if second >= domains else "within" if first == second else "across"
