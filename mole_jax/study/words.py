"""Scores and differences as the report writes them: per cent and points, one decimal."""

from __future__ import annotations

from mole_jax.evaluation.tables import ABSENT
from mole_jax.study.statistics import Estimate


def score(found: Estimate | None) -> str:
    """``41.2 [40.1, 42.3]``."""
    return ABSENT if found is None else f"{100 * found.mean:.1f}{interval(found, '.1f')}"


def difference(found: Estimate | None) -> str:
    """``-6.7 [-8.1, -5.2]``."""
    return ABSENT if found is None else f"{100 * found.mean:+.1f}{interval(found, '+.1f')}"


def interval(found: Estimate, form: str, scale: float = 100) -> str:
    """`` [40.1, 42.3]``, or nothing where there is none."""
    if found.interval is None:
        return ""
    low, high = (format(scale * end, form) for end in found.interval)
    return f" [{low}, {high}]"


def p_value(p: float | None) -> str:
    """Two digits; what is smaller than a table can use is only bounded."""
    if p is None:
        return ABSENT
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def listed(names: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
