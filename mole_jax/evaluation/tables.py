"""Tables of scores: their rows as text, the first one the heading, and the two ways to set them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.forms import MAYBE_NUMBER, NUMBER
from mole_jax.terminal import escaped

ABSENT = "-"
SUM = "ability_sum"
"""The sum of Tiny LVLM-eHub's abilities, as `mole_jax.evaluation.metrics.by_ability` names it."""
Rows = Sequence[Sequence[str]]
EVALUATION = {
    "step": int,
    "tasks": {
        ...: {
            "loss": NUMBER,
            "score": MAYBE_NUMBER,
            "metric": (str, None),
            "questions": (int, None),
            "examples": (int, None),
            "interval": ([NUMBER], None),
            "pins": (dict, None),
            "skipped": ({...: int}, None),
        }
    },
    "abilities": ({...: NUMBER}, None),
}
"""Form of what `mole_jax.evaluation.runner.Evaluator.run` writes."""


def score_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """What one evaluation (`Evaluator.run`) found: a row a task."""
    rows = [["task", "metric", "questions", "score", "loss"]]
    for name, task in scored(result).items():
        known = [str(task.get("metric") or ABSENT), str(task.get("questions", ABSENT))]
        rows.append([name, *known, score(task), number(task.get("loss"), ".3f")])
    return rows


def scored(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The tasks of an evaluation by name; after them, in the same shape, Tiny LVLM-eHub's abilities and their sum."""
    abilities = result.get("abilities", {})
    return {
        **result["tasks"],
        **{name: {"metric": SUM if name == SUM else "contains", "score": value} for name, value in abilities.items()},
    }


def score(task: Mapping[str, Any]) -> str:
    """A task's score times 100, with its interval; what goes beyond 100 is not called a percentage."""
    if task.get("score") is None:
        return ABSENT
    interval = task.get("interval")
    reach = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * task['score']:.1f}{'' if task.get('metric') in ('cider', SUM) else ' %'}{reach}"


def number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def aligned(rows: Rows) -> str:
    """A plain text table; what a cell holds cannot break its line."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(rows: Rows) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"
