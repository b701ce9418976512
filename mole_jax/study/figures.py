"""The figures of a study's report, each a PNG."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mole_jax.colours import PALETTE
from mole_jax.evaluation.plots import _png, experts
from mole_jax.study.analysis import MEAN, Analysis, CurveValue, Estimates
from mole_jax.study.config import Curve
from mole_jax.study.grid import MAIN
from mole_jax.study.results import Results


def draw(results: Results, analysis: Analysis) -> dict[str, bytes]:
    """Returns the figures by name, of whatever has a finished run."""
    drawn = {}
    if any(any(cost.differences.values()) for cost in analysis.conflict):
        drawn["conflict"] = _conflict(results, analysis)
    if any(analysis.result(arm).seeds for arm in results.section(MAIN)):
        drawn["scores"] = _scores(results, analysis)
    for curve in results.curves:
        values = analysis.curves[curve.name]
        if any(at.alone[MEAN] or at.mixture[MEAN] for at in values):
            drawn[curve_name(curve)] = _curve(results, values, curve.axis)
    for arm in results.section(MAIN):
        used = [run.expert_use for _, run in sorted(results.runs[arm.name].items()) if run.expert_use is not None]
        if used:
            drawn[f"experts_{arm.slug}"] = experts(used[0].domains, used[0].use.tolist())
    return drawn


def curve_name(curve: Curve) -> str:
    """Returns the name of a curve's figure, fit for a file."""
    return "curve_" + re.sub(r"\W+", "_", curve.name)


def _conflict(results: Results, analysis: Analysis) -> bytes:
    """The baseline's score of each domain under each mixture, coloured by the difference from the run alone.

    Domains that a mixture does not hold are grey: what is never seen would drown what is lost by mixing.
    """
    costs = analysis.conflict
    points = np.full((len(costs), len(results.domains)), np.nan)
    figure = Figure(figsize=(3 + 1.5 * len(results.domains), 1.6 + 0.5 * len(costs)), layout="constrained")
    axes = figure.subplots()
    for row, cost in enumerate(costs):
        for column, domain in enumerate(results.domains):
            found, test = cost.scores[domain], cost.differences[domain]
            if test is not None and domain in cost.arm.shares:
                points[row, column] = 100 * test.mean
            if found is not None:
                own = cost.arm.shares == {domain: 1.0}
                beside = "alone" if own else f"{100 * test.mean:+.1f}" if test else ""
                axes.text(column, row, f"{100 * found.mean:.1f}\n{beside}", ha="center", va="center", fontsize=9)
    most = max(1.0, float(np.nanmax(np.abs(points), initial=0.0)))
    axes.set_facecolor("#e4e4e4")
    # Pale at both ends, so that black numbers can be read on every cell.
    image = axes.imshow(points, cmap="RdBu", vmin=-1.8 * most, vmax=1.8 * most, aspect="auto")
    axes.set_xticks(range(len(results.domains)), results.domains)
    axes.set_yticks(range(len(costs)), [cost.arm.mixture for cost in costs])
    axes.set(
        title=f"{results.baseline}: score (%) of a domain under a mixture", xlabel="domain asked", ylabel="trained on"
    )
    bar = figure.colorbar(image, ax=axes, label="points against the domain alone")
    bar.ax.set_ylim(-most, most)
    return _png(figure)


def _scores(results: Results, analysis: Analysis) -> bytes:
    """A panel for each domain and their mean, a row for each arm of the main section."""
    names = (MEAN, *results.domains)
    shown = [analysis.result(arm) for arm in results.section(MAIN)]
    adapters = list(dict.fromkeys(result.arm.adapter for result in shown))
    figure = Figure(figsize=(3.5 + 2.4 * len(names), 1.4 + 0.32 * len(shown)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for row, result in enumerate(shown):
            colour = PALETTE[adapters.index(result.arm.adapter) % len(PALETTE)]
            _points(axes, [row], [result.scores], name, colour, horizontal=True)
        axes.set(title=name, xlabel="score (%)")
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(range(len(shown)), [result.arm.name for result in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
    return _png(figure)


def _curve(results: Results, values: Sequence[CurveValue], axis: str) -> bytes:
    """Scores alone and on the mixture over the axis, a panel for each domain and their mean."""
    names = (MEAN, *results.domains)
    figure = Figure(figsize=(1 + 3 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    at = [value.value for value in values]
    for axes, name in zip(panels, names, strict=True):
        _points(axes, at, [value.alone for value in values], name, PALETTE[0], label="the domain alone")
        _points(axes, at, [value.mixture for value in values], name, PALETTE[1], label="the mixture")
        axes.set(title=name, xlabel=axis)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("score (%)")
    panels[0].legend(frameon=False)
    return _png(figure)


def _points(
    axes,
    at: Sequence[float],
    columns: Sequence[Estimates],
    name: str,
    colour: str,
    *,
    horizontal: bool = False,
    label: str | None = None,
) -> None:
    """Draws the estimates of one column with their intervals; those that are not there leave a hole."""
    found = [(where, estimate) for where, column in zip(at, columns, strict=True) if (estimate := column[name])]
    if not found:
        return
    where, means = [where for where, _ in found], [100 * estimate.mean for _, estimate in found]
    reach = [100 * (estimate.interval[1] - estimate.mean) if estimate.interval else 0.0 for _, estimate in found]
    style = {"color": colour, "fmt": "o" if horizontal else "o-", "markersize": 4, "capsize": 3, "label": label}
    if horizontal:
        axes.errorbar(means, where, xerr=reach, **style)
    else:
        axes.errorbar(where, means, yerr=reach, **style)
