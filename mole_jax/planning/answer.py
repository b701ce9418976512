"""What `python -m mole_jax.plan` answers: a config's own plan, or the best of a sweep, with what to change first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mole_jax.config import Config
from mole_jax.planning import report
from mole_jax.planning.advice import advise
from mole_jax.planning.compile import architecture_of
from mole_jax.planning.predict import Prediction, as_json, predict
from mole_jax.planning.sweep import sweep
from mole_jax.planning.topology import devices_of, no_accelerator
from mole_jax.planning.work import work_of


@dataclasses.dataclass(frozen=True)
class Answer:
    """Predictions, best first, and the advice on the best."""

    plans: list[Prediction]
    advice: list[str]
    fitting: int | None = None
    """How many candidates of a sweep fit by a rough estimate; None: there was no sweep."""

    @property
    def best(self) -> Prediction:
        return self.plans[0]

    def text(self) -> str:
        """Returns the report of the best; after a sweep, the table of all stands before it."""
        told = report.text(self.best, self.advice)
        if self.fitting is None:
            return told
        table = report.right_aligned([report.COLUMNS, *map(report.row, self.plans)])
        counted = f"compiled {len(self.plans)} of {self.fitting} that fit by a rough estimate (--limit)"
        return f"{table}\n{counted}; the best of them:\n\n{told}"

    def to_json(self) -> dict[str, Any]:
        """Returns the best as one JSON object, after a sweep with all of them under `sweep`."""
        best = {**as_json(self.best), "advice": self.advice}
        return best if self.fitting is None else {**best, "sweep": [as_json(plan) for plan in self.plans]}


def answer(
    config: Config,
    topology: str,
    *,
    cache: Path,
    preset: str | None,
    depths: tuple[int, int] | None,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Answer:
    """Plans a run on a machine that is not there; from here on this process uses no accelerator.

    Args:
        config, topology, cache, preset, depths: as in `predict`.
        limit: most other candidates to compile, as in `sweep`, which cannot do without `depths`. None: no sweep.
        say: as in `sweep`.

    Raises:
        UserError: as `predict`.
    """
    no_accelerator()
    if limit is None or depths is None:
        plans, fitting = [predict(config, topology, cache=cache, preset=preset, depths=depths)], None
    else:
        plans, fitting = sweep(config, topology, cache=cache, limit=limit, preset=preset, depths=depths, say=say)
    arch = architecture_of(config, preset)
    return Answer(plans, advise(arch, plans[0], work_of(config, arch, devices_of(topology)[0])), fitting)
