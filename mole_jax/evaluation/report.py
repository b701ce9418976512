"""The report of a run: plots, tables and one self-contained page, from the files that the run left.

Reads `config.json`, `starts.jsonl`, `metrics.jsonl`, `eval/step_*.json`, `eval/expert_use.json`, `data_report.json` and
`trainable.json`, at any time of a run; what is missing is left out, and the report says so.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from markupsafe import Markup

from mole_jax import config_json, page, recipes
from mole_jax.config import Config
from mole_jax.data.left_out import of_report
from mole_jax.errors import UserError
from mole_jax.evaluation.tables import ABSENT, EVALUATION, SUM, aligned, number, score, scored
from mole_jax.files import made, path_of, read_json, read_json_lines, write_bytes, write_text
from mole_jax.forms import MAYBE_NUMBER, NUMBER

_EXPERT_KEY = re.compile(r"router/use/(?P<domain>.+)/expert(?P<expert>\d+)")

Tasks = Mapping[str, Mapping[str, Any]]

EXPERT_USE_FILE, STARTS_FILE = "eval/expert_use.json", "starts.jsonl"
CONFIG = {"name": (str, None), "train": ({"log_every": (int, None)}, None)}
METRICS = {"step": int, ...: MAYBE_NUMBER}
EXPERT_USE = {"domains": [str], "use": [[[NUMBER]]]}
_COUNTS = ("usable", "read", "records", "examples", "supervised_tokens")
_SHARES = ("share_expected", "share_of_examples", "share_of_tokens", "share_of_loss")
_DOMAIN = {name: (int, None) for name in _COUNTS} | {name: MAYBE_NUMBER for name in _SHARES}
DATA_REPORT = {"domains": ({...: _DOMAIN | {"skipped": ({...: int}, None)}}, None)}
STARTS = {"date": (str, None), "machine": (str, None), "versions": ({...: str}, None)}
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
    starts: Sequence[Mapping[str, Any]]
    """What each start says of its machine (`mole_jax.training.startup`); nothing in runs of older versions."""


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
        starts=read_json_lines(starts, STARTS) if (starts := folder / STARTS_FILE).exists() else [],
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
    file = folder / "report.html"
    write_text(file, _page(run, pictures, absent))
    return file


def _missing_steps(run: RunFiles) -> list[int]:
    """Returns the steps up to the last that is known whose metrics were due and are not there."""
    every = ((run.config or {}).get("train") or {}).get("log_every") or 0
    if not run.metrics or every < 1:
        return []
    there = {record["step"] for record in run.metrics}
    return [step for step in range(every, max(*there, run.after_step or 0) + 1, every) if step not in there]


class Part(NamedTuple):
    """Of a section: HTML, perhaps folded away behind a line."""

    content: Markup
    folded: str | None = None


class Section(NamedTuple):
    title: str
    parts: Sequence[Part]


def _page(run: RunFiles, pictures: Mapping[str, bytes], absent: Sequence[str]) -> str:
    name = str((run.config or {}).get("name", "run"))

    def section(title: str, *parts: Part | None) -> Section:
        return Section(title, [part for part in parts if part is not None])

    def picture(name: str) -> Part | None:
        return Part(page.picture(pictures[name], name)) if name in pictures else None

    scores = _score_rows(run)
    after = f"After: step {run.after_step}. " if run.after_step else ""
    note = f"{after}In brackets: 95 % bootstrap intervals. Loss: nats per answer token."
    left_out = [one for one in of_report(run.data_report) if one.reasons]
    sections = [
        section(
            "Held-out scores",
            picture("scores"),
            *([Part(page.table(scores)), _paragraph(note)] if len(scores) > 1 else []),
        ),
        section("Training", picture("losses"), _speed(run)),
        section("Experts", picture("experts")),
        section("Trainable parameters", _value_table(run.trainable, folded=_trained(run.trainable))),
        section(
            "Data",
            _mixture(run.data_report),
            *(_paragraph(str(one)) for one in left_out if not one.notable),
            _value_table(run.data_report, folded="everything that was counted"),
        ),
        section("Configuration", *_settings(run.config)),
    ]
    warnings = [f"records left out: {one}" for one in left_out if one.notable]
    return page.render(
        "evaluation/report.html.j2", name, facts=_facts(run), warnings=warnings, sections=sections, absent=absent
    )


def _trained(table: Any) -> str:
    """Returns how many numbers are trained, as a line above their table."""
    numbers = [row.get("numbers") for row in table or []]
    whole = sum(one for one in numbers if isinstance(one, int))
    return f"{whole:,} numbers in {len(numbers)} arrays"


def _facts(run: RunFiles) -> list[str]:
    """Returns when, on what and by which versions a run was started last, as far as it says so."""
    last = run.starts[-1] if run.starts else {}
    steps = run.metrics[-1]["step"] if run.metrics else 0
    versions = [f"{name} {version}" for name, version in (last.get("versions") or {}).items()]
    return [
        f"{steps:,} optimizer steps",
        *([f"started {last['date']}"] if last.get("date") else []),
        *([str(last["machine"])] if last.get("machine") else []),
        *versions,
    ]


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def _paragraph(text: str) -> Part:
    return Part(Markup('<p class="quiet">{}</p>').format(text))


def _mixture(report: Any) -> Part | None:
    """A table of the domains: how much of each was wanted, drawn and weighed in the loss."""
    domains = (report or {}).get("domains") or {}
    rows = [["domain", "records", "drawn", "set", "of the draws", "of the tokens", "answer tokens", "of the loss"]]
    for name, one in domains.items():
        examples = one.get("examples") or 0
        answers = (one.get("supervised_tokens") or 0) / examples if examples else None
        shares = [one.get(share) for share in ("share_expected", "share_of_examples", "share_of_tokens")]
        rows.append(
            [
                name,
                number(one.get("records"), ",.0f"),
                number(examples, ",.0f"),
                *map(_percent, shares),
                number(answers, ".1f"),
                _percent(one.get("share_of_loss")),
            ]
        )
    return Part(page.table(rows)) if len(rows) > 1 else None


def _settings(config: Mapping[str, Any] | None) -> list[Part]:
    """Returns what a config changes of the recipe of its name, or of the defaults; and all of it, folded away."""
    if not config:
        return []
    name = config.get("name")
    shipped = isinstance(name, str) and name in recipes.names()
    base = config_json.to_json(recipes.config(str(name)) if shipped else Config())
    before, now = dict(_leaves(base)), dict(_leaves(config))
    what = f"the recipe {name}" if shipped else "the defaults"
    changed = [
        [field, _text(now.get(field)), _text(before.get(field))]
        for field in {**now, **before}
        if now.get(field) != before.get(field) and field != "name"
    ]
    told = Part(page.table([["changed", "here", what], *changed])) if changed else _paragraph(f"as {what}")
    whole = _value_table(config, folded="all settings")
    return [told, *([whole] if whole else [])]


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


def _speed(run: RunFiles) -> Part | None:
    """Medians over the run of what says how well the machine was used."""
    rows = []
    for key, title, form in (
        ("tokens_per_second", "tokens per second", lambda value: f"{value:,.0f}"),
        ("mfu", "model FLOPs utilisation", _percent),
        ("data_wait_fraction", "share of time waiting for data", _percent),
    ):
        values = [record[key] for record in run.metrics if record.get(key) is not None]
        if values:
            rows.append([f"{title} (median)", form(float(np.median(values)))])
    return Part(page.table([["", ""], *rows])) if rows else None


def _value_table(value: Any, folded: str | None = None) -> Part | None:
    """A table of any JSON value: a list of like objects by columns, anything else as dotted name and value."""
    if not value:
        return None
    if isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
        columns = list(dict.fromkeys(name for row in value for name in row))
        return Part(page.table([columns, *([_text(row.get(name)) for name in columns] for row in value)]), folded)
    return Part(page.table([["", ""], *([name, _text(leaf)] for name, leaf in _leaves(value))]), folded)


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
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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
