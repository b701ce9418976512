"""How many records of a domain are left out and why: what is said of it, and when it is too many."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mole_jax.errors import UserError

NOTABLE = 0.05
"""A larger share of records left out is told in colour."""
ENOUGH = 100
"""Records that must have been read, or all of a domain, before a share is judged by `data.most_skipped`."""


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Of `read` out of a domain's `records` so many are left out for each reason (`mole_jax.data.load.REASONS`)."""

    domain: str
    records: int
    read: int
    reasons: Mapping[str, int]

    @property
    def share(self) -> float:
        """Share of the records read that is left out."""
        return sum(self.reasons.values()) / max(1, self.read)

    @property
    def notable(self) -> bool:
        return self.share > NOTABLE

    def __str__(self) -> str:
        of = f"{self.read:,} records" + ("" if self.read == self.records else f" read, out of {self.records:,},")
        if not self.reasons:
            return f"{self.domain}: none of {of} is left out"
        why = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())
        return f"{self.domain}: {sum(self.reasons.values()):,} of {of} are left out ({self.share:.1%}): {why}"


def lines(found: Sequence[LeftOut], *, begin: str) -> list[tuple[str, bool]]:
    """Returns what to say of all domains after the word `begin`, line by line, and whether a line is notable."""
    if not any(one.reasons for one in found):
        return [(f"{begin}: no record is left out, of {sum(one.read for one in found):,} read", False)]
    return [(f"{begin}: {one}", one.notable) for one in found]


def of_report(report: Mapping[str, Any] | None) -> list[LeftOut]:
    """Returns what `Mixture.report` says of it, for the domains that were read; nothing for one of an older version."""
    domains = (report or {}).get("domains", {}).items()
    return [LeftOut(name, one["usable"], one["read"], one["skipped"]) for name, one in domains if one.get("read")]


def of_task(name: str, task: Mapping[str, Any]) -> LeftOut:
    """Returns it for an evaluated task (`mole_jax.evaluation.runner.Evaluator.run`)."""
    skipped = task.get("skipped", {})
    total = task["examples"] + sum(skipped.values())
    return LeftOut(name, total, total, skipped)


def check(found: Iterable[LeftOut], most: float | None) -> None:
    """Raises `UserError` for the first domain of which more than `most` (`data.most_skipped`) is left out."""
    for one in found:
        if most is not None and one.share > most and one.read >= min(ENOUGH, one.records):
            raise UserError(
                f"domain {one}; that is over data.most_skipped {most}: `python -m mole_jax.data` lists them; mend the "
                "data or the config, or raise that"
            )


def evenly(total: int, most: int) -> Sequence[int]:
    """Returns at most `most` of the numbers below `total`, spread evenly."""
    return range(total) if total <= most else [i * total // most for i in range(most)]
