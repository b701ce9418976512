"""The pictures of a report, each a function from plain values to the bytes of a PNG."""

from __future__ import annotations

import io
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from mole_jax.colours import PALETTE

BEFORE, AFTER = "#b8c4d0", "#2a6fbb"
MOST_ANNOTATED_CELLS = 96
"""Cells of a heat map up to which each carries its number."""


def losses(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Training loss by domain over the steps, from the objects of metrics.jsonl: faint each step, full the mean."""
    names = sorted({name for record in records for name in record if name.startswith("loss/")}) or ["loss"]
    figure, axes = _figure(8, 4.5)
    window = max(1, len(records) // 40)
    for number, name in enumerate(names):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if not points:
            continue
        steps, values = np.array(points, np.float64).T
        colour = PALETTE[number % len(PALETTE)]
        label = name.removeprefix("loss/") if "/" in name else "all domains"
        span = min(window, len(values))
        if span > 1:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            means = np.convolve(values, np.full(span, 1 / span), mode="valid")
            axes.plot(steps[span - 1 :], means, color=colour, linewidth=2, label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=2, marker="o" if len(values) == 1 else None, label=label)
    axes.set(title="Training loss by domain", xlabel="optimizer step", ylabel="loss (nats per answer token)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, title=f"mean of {window} steps" if window > 1 else None)
    return _png(figure)


def experts(domains: Sequence[str], use: Sequence[Sequence[Sequence[float]]]) -> bytes:
    """Heat maps of expert use: `use` is (domain, layer, expert), the fraction of the domain's tokens."""
    return expert_maps(
        [""], domains, np.asarray(use)[None], title="Expert use by domain", label="fraction of the domain's tokens"
    )


def expert_maps(
    rows: Sequence[str], columns: Sequence[str], values: np.ndarray, *, title: str, label: str, signed: bool = False
) -> bytes:
    """Heat maps of layer by expert, one for each of `rows` and `columns`.

    `values` is (row, column, layer, expert): fractions, or with `signed` numbers around 0. What is NaN stays blank.
    """
    *_, layers, count = values.shape
    figure = Figure(
        figsize=(
            1.6 + len(columns) * max(2.0, 0.55 * count + 0.8),
            0.6 + len(rows) * max(2.0, 0.8 + 0.3 * layers),
        ),
        layout="constrained",
    )
    grid = figure.subplots(len(rows), len(columns), sharey=True, squeeze=False)
    most = largest(values) if signed else 1.0
    image = None
    for (row, column), axes in np.ndenumerate(grid):
        image = heat(axes, values[row, column], most, signed=signed, numbers=layers * count <= MOST_ANNOTATED_CELLS)
        axes.set(xticks=range(count))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name)
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    for axes, name in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(f"{name}\ndecoder layer" if name else "decoder layer")
    figure.suptitle(title)
    if image is not None:
        figure.colorbar(image, ax=grid.ravel().tolist(), label=label)
    return _png(figure)


def largest(values: np.ndarray) -> float:
    """The largest absolute value, for the two ends of a signed scale; never 0."""
    return float(np.nanmax(np.abs(values), initial=0.0)) or 1.0


def heat(axes: Any, table: np.ndarray, most: float, *, signed: bool, numbers: bool) -> Any:
    """Draws one heat map on a scale from 0 (with `signed`: -`most`) to `most`, if wanted with each cell's number."""
    low, colours, form = (-most, "RdBu_r", "+.3f") if signed else (0.0, "Blues", ".2f")
    image = axes.imshow(table, vmin=low, vmax=most, cmap=colours, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if numbers and np.isfinite(value):
            ink = "white" if abs(value) > 0.55 * most else "black"
            axes.text(column, row, format(value, form), ha="center", va="center", color=ink, fontsize=8)
    return image


def scores(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Bars of the score of each task before and after, with their 95 % intervals; either may lack tasks."""
    names = [name for name in {**before, **after} if _scored(before.get(name)) or _scored(after.get(name))]
    figure, axes = _figure(max(4.5, 1.8 + 1.7 * len(names)), 4.5)
    width = 0.36
    for label, tasks, colour, shift in (("before", before, BEFORE, -0.5), ("after", after, AFTER, 0.5)):
        shown = [(number, tasks[name]) for number, name in enumerate(names) if _scored(tasks.get(name))]
        if not shown:
            continue
        at = np.array([number + shift * width for number, _ in shown])
        height = np.array([100 * task["score"] for _, task in shown])
        ends = np.array([[100 * end for end in task.get("interval") or [task["score"]] * 2] for _, task in shown])
        reach = np.maximum(0, [height - ends[:, 0], ends[:, 1] - height])
        axes.bar(at, height, width * 0.94, color=colour, label=label)
        axes.errorbar(at, height, reach, fmt="none", ecolor="#333333", elinewidth=1.2, capsize=4)
        for x, y, top in zip(at, height, ends[:, 1], strict=True):
            axes.text(x, max(y, top) + 1.5, f"{y:.1f}", ha="center", fontsize=9)
    metrics = sorted({str(task["metric"]) for task in [*before.values(), *after.values()] if task.get("metric")})
    axes.set(title="Score by task, with 95 % intervals", ylabel=f"score (%): {', '.join(metrics)}")
    # CIDEr goes beyond 100.
    axes.set_ylim(0, max(109, 1.09 * axes.get_ylim()[1]))
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return _png(figure)


def _scored(task: Mapping[str, Any] | None) -> bool:
    return task is not None and task.get("score") is not None


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of its own, outside pyplot's global state, of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    # A domain's name may hold dollars, which do not make it a formula.
    for text in figure.findobj(Text):
        typing.cast(Text, text).set_parse_math(False)
    data = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}):  # of labels that are only made when it is drawn
        FigureCanvasAgg(figure).print_figure(data, dpi=130, format="png", metadata={"Software": None})
    return data.getvalue()
