"""What a study says, in plain words: each sentence follows from a number beside it."""

from __future__ import annotations

from mole_jax.study.analysis import MEAN, Analysis, Comparison, Cost
from mole_jax.study.grid import MAIN
from mole_jax.study.results import Results
from mole_jax.study.words import difference, listed, p_value

_UNTOLD = "too few seeds"


def finding(results: Results, analysis: Analysis) -> str:
    """Returns the finding, one paragraph; it tells as well where the data contradict the paper."""
    if len(results.missing) == results.planned:
        return "No run is finished, so the study says nothing yet."
    sentences = [_conflict(results, analysis)]
    clauses: dict[str, list[str]] = {}
    for cost in analysis.adapters:
        if cost.arm.kind == "mole":
            clauses.setdefault(cost.arm.name, []).append(_kept(results, cost))
    for one in analysis.comparisons:
        if MAIN in one.a.sections and MAIN in one.b.sections:
            clauses.setdefault(one.a.name, []).append(_compared(one))
    sentences += [f"{name}: {'; '.join(said)}." for name, said in clauses.items()]
    if results.missing:
        sentences.append(f"{len(results.missing)} of {results.planned} runs are missing, so this is not final.")
    return " ".join(sentences)


def _conflict(results: Results, analysis: Analysis) -> str:
    cost = analysis.baseline
    if cost is None:
        return (
            f"The study has no run of {results.baseline} on all domains with as many samples as the single-domain "
            "runs, so it does not measure a conflict."
        )
    told = []
    verdicts: dict[str, list[str]] = {}
    for domain in results.domains:
        mixed, alone, test = cost.scores[domain], cost.alone[domain], cost.differences[domain]
        if mixed is None or alone is None or test is None:
            verdicts.setdefault(_UNTOLD, []).append(domain)
            continue
        told.append(f"{100 * mixed.mean:.1f} against {100 * alone.mean:.1f} alone on {domain} ({difference(test)})")
        verdicts.setdefault(test.verdict, []).append(domain)
    numbers = f"On {cost.arm.mixture}, plain {results.baseline} scores {listed(told)}" if told else ""
    return f"{numbers}: {_measured(verdicts)}." if numbers else f"{_measured(verdicts)}.".capitalize()


def _measured(verdicts: dict[str, list[str]]) -> str:
    """What the baseline's differences are together: the paper says below, on all of them."""
    parts = []
    if "below" in verdicts:
        parts.append(f"a conflict on {listed(verdicts['below'])}")
    elif set(verdicts) <= {"above", "not told apart"}:
        parts.append("no conflict was measured, unlike in the paper")
    if "above" in verdicts:
        parts.append(f"mixing helps on {listed(verdicts['above'])}")
    if "below" in verdicts and "not told apart" in verdicts:
        parts.append(f"no difference is told on {listed(verdicts['not told apart'])}")
    if _UNTOLD in verdicts:
        parts.append(f"too few seeds are finished to tell on {listed(verdicts[_UNTOLD])}")
    return "; ".join(parts)


def _kept(results: Results, cost: Cost) -> str:
    """Whether an adapter on the mixture keeps what the baseline has alone; the paper says so."""
    test = cost.differences[MEAN]
    if test is None:
        return f"no finished seed in common with the single-domain runs of {results.baseline}"
    unlike = ", unlike in the paper" if test.verdict == "below" else ""
    return f"{difference(test)} against the single-domain runs of {results.baseline} ({test.verdict}{unlike})"


def _compared(one: Comparison) -> str:
    test = one.differences[MEAN]
    if test is None:
        return f"no finished seed in common with {one.b.name}"
    p = "" if one.p is None else f", corrected p {p_value(one.p)}"
    return f"{difference(test)} against {one.b.name} ({one.verdict}{p})"
