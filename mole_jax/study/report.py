"""The report of a study: `report.md`, `report.json` and the figures, from the files that its runs left."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Collection, Sequence

from etils import epath

from mole_jax.evaluation.tables import ABSENT, Rows, aligned, markdown, number
from mole_jax.files import made, write_bytes, write_text
from mole_jax.study import figures
from mole_jax.study.analysis import MEAN, Analysis, Comparison, Cost, analyse, sections
from mole_jax.study.finding import finding
from mole_jax.study.grid import MAIN, Arm
from mole_jax.study.results import Gap, Results, read
from mole_jax.study.words import difference, interval, p_value, score

_READING = (
    "Scores are {score} in per cent, differences are in points. In brackets: 95 % Student-t intervals over seeds. They "
    "hold the chance of training, not that of the choice of questions, which all runs share. Differences are paired by "
    "seed. The step time is the ratio of the median step to that of {baseline} on the same mixture, if as many seeds "
    "ran together."
)
_CONFLICT = (
    "Rows are mixtures, columns the domain that is asked. In parentheses: the difference from the run that saw this "
    "domain alone, with as many samples of it. These intervals are not corrected for their number. Grey in the figure: "
    "a domain that the mixture does not hold."
)
_COMPARISONS = (
    "A - B on the mean of the domains, by paired t-test; p is corrected for {count} comparisons (Holm). The verdict is "
    "of A, by that p against 0.05; the interval is not corrected, nor are the differences by domain."
)
_EXPERTS = (
    "Mutual information of expert and domain: 0 where every domain uses the experts alike, at most the logarithm of "
    "the smaller of their numbers. Mean over layers and seeds. The figures show the first seed: experts have no order, "
    "so their shares have no mean over seeds."
)
_WIDTH = 120


def write(folder: epath.Path) -> str:
    """Writes ``report.md``, ``report.json`` and ``plots/*.png`` into the study's folder.

    Returns:
        The finding and the main table, for a terminal.

    Raises:
        UserError: there is no study, or one of its files is malformed.
    """
    results = read(folder)
    analysis = analyse(results)
    said = finding(results, analysis)
    drawn = figures.draw(results, analysis)
    made(folder / "plots")
    for name, data in drawn.items():
        write_bytes(folder / "plots" / f"{name}.png", data)
    write_text(folder / "report.json", json.dumps(_values(results, analysis, said), indent=1))
    write_text(folder / "report.md", _page(results, analysis, said, drawn))
    return f"{textwrap.fill(said, _WIDTH)}\n\n{aligned(_arm_rows(results, analysis, results.section(MAIN)))}"


def _page(results: Results, analysis: Analysis, said: str, drawn: Collection[str]) -> str:
    def pictures(*names: str) -> list[str]:
        return [f"![{name}](plots/{name}.png)\n" for name in names if name in drawn]

    parts = [f"# {results.name}\n", f"{said}\n", f"{_READING.format(score=results.score, baseline=results.baseline)}\n"]
    if analysis.conflict:
        parts += [f"## Conflict of {results.baseline}\n", f"{_CONFLICT}\n", *pictures("conflict")]
        parts += [markdown(_cost_rows(results, analysis.conflict, "mixture"))]
    if analysis.adapters:
        title = f"## The other adapters on {analysis.mixture}, against the single-domain runs of {results.baseline}\n"
        parts += [title, markdown(_cost_rows(results, analysis.adapters, "adapter"))]
    parts += ["## Main table\n", *pictures("scores"), markdown(_arm_rows(results, analysis, results.section(MAIN)))]
    if analysis.comparisons:
        parts += ["## Comparisons\n", f"{_COMPARISONS.format(count=len(analysis.comparisons))}\n"]
        parts += [markdown(_comparison_rows(results, analysis.comparisons))]
    for name in sections(results):
        parts += [f"## {name.capitalize()}\n", markdown(_arm_rows(results, analysis, results.section(name)))]
    for curve in results.curves:
        parts += [f"## Curve: {curve.name}\n", *pictures(figures.curve_name(curve))]
        parts += [markdown(_curve_rows(results, analysis, curve.name, curve.axis))]
    if analysis.experts:
        uses = pictures(*(name for name in drawn if name.startswith("experts_")))
        parts += ["## Expert use by domain\n", f"{_EXPERTS}\n", markdown(_expert_rows(analysis)), *uses]
    parts += ["## Runs and questions\n", *_account(results)]
    return "\n".join(parts)


def _arm_rows(results: Results, analysis: Analysis, arms: Sequence[Arm]) -> Rows:
    rows = [["arm", "seeds", MEAN, *results.domains, "held-out loss", "trainable", "steps", "step time"]]
    for arm in arms:
        result = analysis.result(arm)
        rows.append(
            [
                arm.name,
                f"{result.seeds}" if result.seeds == len(results.seeds) else f"{result.seeds} of {len(results.seeds)}",
                *(score(result.scores[name]) for name in (MEAN, *results.domains)),
                number(result.loss and result.loss.mean, ".3f"),
                number(arm.trainable, ","),
                f"{arm.steps:,}",
                ABSENT if result.step_time is None else f"{result.step_time:.2f}x",
            ]
        )
    return rows


def _cost_rows(results: Results, costs: Sequence[Cost], heading: str) -> Rows:
    rows = [[heading, MEAN, *results.domains]]
    for cost in costs:
        cells = []
        for name in (MEAN, *results.domains):
            found, own = cost.scores[name], cost.arm.adapter == results.baseline and cost.arm.shares == {name: 1.0}
            beside = "alone" if own else difference(cost.differences[name])
            cells.append(ABSENT if found is None else f"{100 * found.mean:.1f} ({beside})")
        rows.append([getattr(cost.arm, heading), *cells])
    return rows


def _comparison_rows(results: Results, comparisons: Sequence[Comparison]) -> Rows:
    rows = [["A", "B", "seeds", "A - B", "p", "verdict", *results.domains]]
    for one in comparisons:
        test = one.differences[MEAN]
        known = [str(test.seeds) if test else "0", difference(test), p_value(one.p), one.verdict]
        rows.append([one.a.name, one.b.name, *known, *(difference(one.differences[name]) for name in results.domains)])
    return rows


def _curve_rows(results: Results, analysis: Analysis, name: str, axis: str) -> Rows:
    names = (MEAN, *results.domains)
    rows = [[axis, "alone", "mixture", *(f"difference, {name}" for name in names)]]
    for at in analysis.curves[name]:
        differences = [difference(at.differences[name]) for name in names]
        rows.append([f"{at.value:g}", score(at.alone[MEAN]), score(at.mixture[MEAN]), *differences])
    return rows


def _expert_rows(analysis: Analysis) -> Rows:
    rows = [["arm", "experts", "seeds", "mutual information (nats)", "at most"]]
    for found in analysis.experts:
        cell = f"{found.information.mean:.3f}{interval(found.information, '.3f', scale=1)}"
        rows.append([found.arm.name, str(found.arm.experts), str(found.information.seeds), cell, f"{found.most:.3f}"])
    return rows


def _account(results: Results) -> list[str]:
    """Seeds, runs done and not done, and the questions that were asked."""
    done = results.planned - len(results.missing)
    lines = [f"Seeds: {', '.join(map(str, results.seeds))}. Runs: {done} of {results.planned} are finished.\n"]
    for domain in results.domains:
        counts = " or ".join(map(str, results.questions(domain))) or "the evaluations do not tell how many"
        lines.append(f"- {domain}: {counts} questions")
    for title, gaps in (("Missing runs", results.missing), ("Finished runs lack", results.remarks)):
        if gaps:
            lines += [f"\n{title}:\n", *_grouped(gaps)]
    return [*lines, ""]


def _grouped(gaps: Sequence[Gap]) -> list[str]:
    seeds: dict[tuple[str, str], list[str]] = {}
    for gap in gaps:
        seeds.setdefault((gap.arm, gap.what), []).append(str(gap.seed))
    return [f"- {arm} (seed {', '.join(found)}): {what}" for (arm, what), found in seeds.items()]


def _values(results: Results, analysis: Analysis, said: str) -> dict[str, object]:
    """What `report.json` has: fractions, not per cent, and arms by name."""

    def plain(fields: list[tuple[str, object]]) -> dict[str, object]:
        return {name: value["name"] if isinstance(value, dict) and "slug" in value else value for name, value in fields}

    return {
        "name": results.name,
        "score": results.score,
        "finding": said,
        "baseline": results.baseline,
        "arms": [dataclasses.asdict(arm) for arm in results.arms],
        **dataclasses.asdict(analysis, dict_factory=plain),
        "seeds": results.seeds,
        "questions": {domain: results.questions(domain) for domain in results.domains},
        "missing": [dataclasses.asdict(gap) for gap in results.missing],
        "remarks": [dataclasses.asdict(gap) for gap in results.remarks],
    }
