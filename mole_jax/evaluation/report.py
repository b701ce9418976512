"""The report of a run: plots, tables and one self-contained page, from the files that the run left.

Reads `config.json`, `metrics.jsonl`, `eval/step_*.json`, `eval/expert_use.json`, `data_report.json` and
`trainable.json`; what is missing is left out, and the report says so.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mole_jax.data.left_out import of_report
from mole_jax.errors import UserError
from mole_jax.evaluation.tables import ABSENT, EVALUATION, SUM, Rows, aligned, number, score, scored
from mole_jax.files import made, path_of, read_json, read_json_lines, write_bytes, write_text
from mole_jax.forms import MAYBE_NUMBER, NUMBER

_EXPERT_KEY = re.compile(r"router/use/(?P<domain>.+)/expert(?P<expert>\d+)")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #eee; text-align: left; }
td:not(:first-child) { font-variant-numeric: tabular-nums; } img { max-width: 100%; } .quiet { color: #777; }
"""

Tasks = Mapping[str, Mapping[str, Any]]

EXPERT_USE_FILE = "eval/expert_use.json"
CONFIG = {"name": (str, None), "train": ({"log_every": (int, None)}, None)}
METRICS = {"step": int, ...: MAYBE_NUMBER}
EXPERT_USE = {"domains": [str], "use": [[[NUMBER]]]}
DATA_REPORT = {
    "domains": ({...: {"usable": (int, None), "read": (int, None), "skipped": ({...: int}, None)}}, None),
}
"""Forms of what a report reads (`mole_jax.forms`); data reports of older versions have no such counts."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What a run left behind; None or empty where it left nothing."""

    config: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]]
    before: Tasks
    """Tasks of the evaluation before the first step, and Tiny LVLM-eHub's abilities (`tables.scored`)."""
    after: Tasks
    """Those of the last evaluation after it."""
    after_step: int | None
    expert_use: Mapping[str, Any] | None
    data_report: Any
    trainable: Any


def read_run(workdir: os.PathLike[str] | str) -> RunFiles:
    """Reads the files of the run in `workdir`; raises `UserError` where there is no such folder."""
    folder = path_of(workdir)
    if not folder.exists():
        raise UserError(f"{workdir}: there is no such run folder")
    results = (folder / "eval").glob("step_*.json") if (folder / "eval").exists() else ()
    by_step = {found["step"]: scored(found) for path in results if (found := _read(path, EVALUATION))}
    last = max(by_step, default=0)
    metrics = read_json_lines(folder / "metrics.jsonl", METRICS) if (folder / "metrics.jsonl").exists() else []
    return RunFiles(
        config=_read(folder / "config.json", CONFIG),
        metrics=metrics,
        before=by_step.get(0, {}),
        after=by_step[last] if last > 0 else {},
        after_step=last or None,
        expert_use=_read(folder / EXPERT_USE_FILE, EXPERT_USE) or _expert_use(metrics),
        data_report=_read(folder / "data_report.json", DATA_REPORT),
        trainable=_read(folder / "trainable.json", [dict]),
    )


def summary_table(workdir: os.PathLike[str] | str) -> str:
    """The scores and held-out losses before and after training, a plain text table of one line per task."""
    rows = _score_rows(read_run(workdir))
    return aligned(rows) if len(rows) > 1 else "no evaluation was made"


def write_report(workdir: os.PathLike[str] | str) -> epath.Path:
    """Writes `plots/*.png` and `report.html` into the run's folder and returns the page's path."""
    from mole_jax.evaluation import plots  # training imports this file long before it draws

    folder = path_of(workdir)
    run = read_run(folder)
    absent: list[str] = []
    if run.expert_use and not (folder / EXPERT_USE_FILE).exists():
        absent.append("expert use on held-out data: no eval/expert_use.json; shown is that of the last step")
    pictures = {}
    for name, data, why in (
        ("losses", plots.losses(run.metrics) if run.metrics else None, "losses: no metrics.jsonl"),
        ("scores", _scores_plot(run), "scores: no evaluation with scores"),
        (
            "experts",
            plots.experts(run.expert_use["domains"], run.expert_use["use"]) if run.expert_use else None,
            "expert use: neither eval/expert_use.json nor router/use/ metrics (a run without routed experts has none)",
        ),
    ):
        if data is None:
            absent.append(why)
            continue
        write_bytes(made(folder / "plots") / f"{name}.png", data)
        pictures[name] = data
    if missing := _missing_steps(run):
        absent.append(f"metrics: metrics.jsonl has no lines of {len(missing)} steps from {missing[0]} to {missing[-1]}")
    if run.after and not run.before:
        absent.append("before: there was no evaluation before the first step")
    if run.before and not run.after:
        absent.append("after: there was no evaluation after the first step")
    for name in ("config", "data_report", "trainable"):
        if not getattr(run, name):
            absent.append(f"{name}: no {name}.json, or nothing in it")
    page = folder / "report.html"
    write_text(page, _page(run, pictures, absent))
    return page


def _missing_steps(run: RunFiles) -> list[int]:
    """Returns the steps up to the last that is known whose metrics were due and are not there."""
    every = ((run.config or {}).get("train") or {}).get("log_every") or 0
    if not run.metrics or every < 1:
        return []
    there = {record["step"] for record in run.metrics}
    return [step for step in range(every, max(*there, run.after_step or 0) + 1, every) if step not in there]


def _page(run: RunFiles, pictures: Mapping[str, bytes], absent: Sequence[str]) -> str:
    name = str((run.config or {}).get("name", "run"))
    steps = run.metrics[-1]["step"] if run.metrics else 0
    body = [f"<h1>{html.escape(name)}</h1>", f'<p class="quiet">{steps} optimizer steps</p>']

    def section(title: str, *parts: str) -> None:
        if any(parts):
            body.extend([f"<h2>{html.escape(title)}</h2>", *parts])

    def picture(name: str) -> str:
        if name not in pictures:
            return ""
        return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'

    scores = _score_rows(run)
    after = f"After: step {run.after_step}. " if run.after_step else ""
    note = f'<p class="quiet">{after}In brackets: 95 % bootstrap intervals. Loss: nats per answer token.</p>'
    section("Held-out scores", picture("scores"), *([_table(scores), note] if len(scores) > 1 else []))
    section("Training", picture("losses"), _speed(run))
    section("Experts", picture("experts"))
    section("Trainable parameters", _value_table(run.trainable))
    left_out = [str(one) for one in of_report(run.data_report) if one.reasons]
    section("Data", *(f"<p>{html.escape(line)}</p>" for line in left_out), _value_table(run.data_report))
    section("Configuration", _value_table(run.config))
    section("Left out", *(f"<p>{html.escape(line)}</p>" for line in absent))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, body)) + "\n</body></html>\n"
    )


def _scores_plot(run: RunFiles) -> bytes | None:
    before, after = ({name: task for name, task in tasks.items() if name != SUM} for tasks in (run.before, run.after))
    scores = [task.get("score") for task in (*before.values(), *after.values())]
    if all(score is None for score in scores):
        return None
    from mole_jax.evaluation import plots

    return plots.scores(before, after)


def _score_rows(run: RunFiles) -> list[list[str]]:
    """Heading and one row per task, as text."""
    rows = [["task", "metric", "questions", "score before", "score after", "loss before", "loss after"]]
    for name in {**run.before, **run.after}:
        before, after = run.before.get(name, {}), run.after.get(name, {})
        known = {**before, **after}
        rows.append(
            [
                name,
                str(known.get("metric") or ABSENT),
                str(known.get("questions", ABSENT)),
                *(score(task) for task in (before, after)),
                *(number(task.get("loss"), ".3f") for task in (before, after)),
            ]
        )
    return rows


def _speed(run: RunFiles) -> str:
    """Medians over the run of what says how well the machine was used."""
    rows = []
    for key, title, form in (
        ("tokens_per_second", "tokens per second", ",.0f"),
        ("mfu", "model FLOPs utilisation", ".1%"),
        ("data_wait_fraction", "share of time waiting for data", ".1%"),
    ):
        values = [record[key] for record in run.metrics if record.get(key) is not None]
        if values:
            rows.append([f"{title} (median)", format(float(np.median(values)), form)])
    return _table([["", ""], *rows]) if rows else ""


def _value_table(value: Any) -> str:
    """A table of any JSON value: a list of like objects by columns, anything else as dotted name and value."""
    if not value:
        return ""
    if isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
        columns = list(dict.fromkeys(name for row in value for name in row))
        return _table([columns, *([_text(row.get(name)) for name in columns] for row in value)])
    return _table([["", ""], *([name, _text(leaf)] for name, leaf in _leaves(value))])


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = list(enumerate(value))
    else:
        return [(name, value)]
    return [leaf for key, item in items for leaf in _leaves(item, f"{name}.{key}" if name else str(key))]


def _text(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(rows: Rows) -> str:
    """An HTML table; the first row is the heading, left out where it is empty."""
    heading = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    lines = [f"<tr>{heading}</tr>"] if any(rows[0]) else []
    for row in rows[1:]:
        lines.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _expert_use(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Expert use of the last step that recorded it, averaged over layers, in the shape of eval/expert_use.json."""
    for record in reversed(metrics):
        found = [(match, record[key]) for key in record if (match := _EXPERT_KEY.fullmatch(key))]
        if found:
            domains = list(dict.fromkeys(match["domain"] for match, _ in found))
            use = np.zeros((len(domains), 1, 1 + max(int(match["expert"]) for match, _ in found)))
            for match, value in found:
                use[domains.index(match["domain"]), 0, int(match["expert"])] = value or 0.0
            return {"domains": domains, "use": use.tolist()}
    return None


def _read(path: epath.Path, form: Any = dict) -> Any:
    """Returns the JSON value in `path`; None where there is no such file."""
    return read_json(path, form, remedy="delete it to make the report without it") if path.exists() else None
