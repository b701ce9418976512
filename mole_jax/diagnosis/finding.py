"""One row of what `doctor` tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from mole_jax.evaluation.tables import aligned


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do where it is not as it should be."""

    check: str
    found: str
    state: Literal["ok", "off", "wrong"] = "ok"
    """`off`: it works, worse than it should; `wrong`: results are not to be trusted."""
    advice: str = ""


def table(findings: Sequence[Finding]) -> Iterator[str]:
    """Yields the table, then a line of advice for each row that is not ok."""
    yield aligned([["check", "found", ""], *([one.check, one.found, one.state] for one in findings)])
    yield from (f"{one.state}: {one.check}: {one.advice}" for one in findings if one.state != "ok")
