"""The report: its numbers are the files' numbers, and what is missing is said."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from mole_jax import config_json, recipes
from mole_jax.errors import UserError
from mole_jax.evaluation import plots
from mole_jax.evaluation.report import read_run, summary_table, write_report
from tests.chaos import doors, spoiling


def task(score, loss):
    interval = None if score is None else [score - 0.051, score + 0.043]
    return {"loss": loss, "score": score, "interval": interval, "metric": "exact_match", "questions": 123}


@pytest.fixture
def workdir(tmp_path):
    rng = np.random.default_rng(0)
    domains = ["general", "document", "biomedical"]
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 201):
            losses = {f"loss/{name}": (n + 2) * 0.98**step + rng.random() for n, name in enumerate(domains)}
            if step % 7 == 0:
                losses["loss/document"] = None
            record = {"step": step, "loss": 1.0, **losses, "tokens_per_second": 4000 + step, "mfu": 0.412}
            file.write(json.dumps(record) + "\n")
    (tmp_path / "eval").mkdir()
    for step, scores in ((0, [0.0, 0.113, 0.25]), (100, [None] * 3), (200, [0.777, 0.9, 0.625])):
        tasks = {name: task(score, 2.345 - step / 100) for name, score in zip(domains, scores, strict=True)}
        (tmp_path / "eval" / f"step_{step:08d}.json").write_text(json.dumps({"step": step, "tasks": tasks}))
    use = rng.dirichlet([0.4] * 4, (3, 4)).tolist()
    (tmp_path / "eval" / "expert_use.json").write_text(json.dumps({"domains": domains, "use": use}))
    (tmp_path / "config.json").write_text(json.dumps({"name": "try <1>", "adapter": {"rank": 37}, "seed": None}))
    (tmp_path / "data_report.json").write_text(json.dumps({"skipped": {"document": {"too_long": 17}}}))
    table = [{"group": "experts", "numbers": 1234567}, {"group": "router", "numbers": 89}]
    (tmp_path / "trainable.json").write_text(json.dumps(table))
    return tmp_path


def text_of(page) -> str:
    return re.sub(r"<[^>]+>", "|", page.read_text().split("<body>")[1])


def test_page_has_the_numbers_of_the_files(workdir):
    text = text_of(write_report(workdir))
    for expected in (
        "77.7 % [72.6, 82.0]",
        "11.3 % [6.2, 15.6]",
        "2.345",
        "0.345",
        "1,234,656 numbers in 2 arrays",
        "1,234,567",
        "skipped.document.too_long||17",
        "adapter.rank||37",
        "try &lt;1&gt;",
        "41.2 %",
        "After: step 200",
        "200 optimizer steps",
    ):
        assert expected in text, expected
    assert "Left out" not in text


def test_a_domain_that_loses_many_records_is_a_warning_and_the_mixture_a_table(workdir):
    few, many = ({"records": 200, "usable": 200, "read": 200, "skipped": {"too long": n}} for n in (10, 11))
    shares = {"share_expected": 0.5, "share_of_examples": 0.501, "share_of_tokens": 0.25, "share_of_loss": 0.125}
    report = {"domains": {"few": few | shares | {"examples": 300, "supervised_tokens": 750}, "many": many}}
    (workdir / "data_report.json").write_text(json.dumps(report))
    page = write_report(workdir).read_text()
    (warning,) = re.findall(r'<p class="warning">([^<]+)</p>', page)
    assert warning == "records left out: many: 11 of 200 records are left out (5.5%): 11 too long"
    assert '<p class="quiet">few: 10 of 200 records are left out (5.0%): 10 too long</p>' in page
    assert "few||200||300||50.0 %||50.1 %||25.0 %||2.5||12.5 %" in text_of(workdir / "report.html")


def test_what_a_config_changes_of_its_recipe_or_of_the_defaults_is_told(workdir):
    config = config_json.to_json(recipes.config("quickstart"))
    for name, against in (("quickstart", "the recipe quickstart"), ("mine", "the defaults")):
        (workdir / "config.json").write_text(json.dumps({**config, "name": name, "seed": 41}))
        changed = text_of(write_report(workdir)).partition(f"changed||here||{against}")[2].partition("all settings")[0]
        assert "seed||41||0" in changed
        assert ("train.steps||200||" in changed) == (name == "mine")


def test_when_on_what_and_by_which_versions_it_was_started(workdir):
    starts = [{"step": 1}, {"step": 5, "date": "2026-01-02 03:04 UTC", "machine": "8 x x", "versions": {"jax": "9.9"}}]
    (workdir / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    assert "200 optimizer steps · started 2026-01-02 03:04 UTC · 8 x x · jax 9.9" in text_of(write_report(workdir))


def test_the_command_writes_the_page_of_a_run_that_was_killed(workdir):
    for file in ("eval", "data_report.json"):
        spoiling.remove(workdir / file)
    said = doors.here("report", "--workdir", workdir)
    assert said.status == 0, said
    assert said.out == f"no evaluation was made\nreport: {workdir / 'report.html'}\n"
    assert "scores: no evaluation" in text_of(workdir / "report.html")
    assert "there is no such run folder" in doors.here("report", "--workdir", workdir / "nowhere").line


def test_page_stands_alone_with_the_three_plots(workdir):
    page = write_report(workdir).read_text()
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert page.count("src=") == len(found) == 3
    assert "http" not in page
    embedded = {base64.b64decode(data) for data in found}
    assert embedded == {path.read_bytes() for path in (workdir / "plots").glob("*.png")}
    assert {path.name for path in (workdir / "plots").iterdir()} == {"losses.png", "experts.png", "scores.png"}
    assert all(Image.open(io.BytesIO(data)).width > 500 for data in embedded)


def test_summary_has_one_aligned_line_per_task(workdir):
    heading, rule, *lines = summary_table(workdir).splitlines()
    assert [line.split()[0] for line in lines] == ["general", "document", "biomedical"]
    assert re.split(r"\s{2,}", lines[1]) == [
        "document", "exact_match", "123", "11.3 % [6.2, 15.6]", "90.0 % [84.9, 94.3]", "2.345", "0.345",
    ]  # fmt: skip
    assert all(line.index("exact_match") == heading.index("metric") for line in lines)
    assert set(rule) == {"-", " "}


def test_missing_pieces_are_left_out_and_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"st')
    text = text_of(write_report(tmp_path))
    for piece in ("scores: no evaluation", "expert use:", "config: no", "data_report: no", "trainable: no"):
        assert piece in text
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["losses.png"]
    assert summary_table(tmp_path) == "no evaluation was made"


@pytest.mark.parametrize(("every", "missing"), [(1, "80 steps from 121 to 200"), (50, "2 steps from 150 to 200")])
def test_metrics_that_end_before_the_evaluation_are_told(workdir, every, missing):
    (workdir / "config.json").write_text(json.dumps({"name": "try", "train": {"log_every": every}}))
    file = workdir / "metrics.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True)[:120]))
    assert f"metrics: metrics.jsonl has no lines of {missing}" in text_of(write_report(workdir))


def test_files_with_nothing_in_them_are_told(workdir):
    for name in ("config", "data_report", "trainable"):
        (workdir / f"{name}.json").write_text("[]" if name == "trainable" else "{}")
    text = text_of(write_report(workdir))
    assert all(f"{name}: no {name}.json, or nothing in it" in text for name in ("config", "data_report", "trainable"))


def test_evaluation_without_a_start_is_no_before(workdir):
    (workdir / "eval/step_00000000.json").unlink()
    assert read_run(workdir).before == {}
    assert "there was no evaluation before the first step" in text_of(write_report(workdir))


def test_losses_without_generation_still_make_a_table(workdir):
    for path in (workdir / "eval").glob("step_*.json"):
        found = json.loads(path.read_text())
        for scored in found["tasks"].values():
            scored |= {"score": None, "interval": None}
        path.write_text(json.dumps(found))
    text = text_of(write_report(workdir))
    assert "scores: no evaluation with scores" in text
    assert "2.345" in text


def test_expert_use_is_taken_from_the_last_metrics_that_have_it(tmp_path):
    lines = [
        {"step": 1, "router/use/a/b/expert0": 0.1},
        {"step": 2, "router/use/a/b/expert0": 0.25, "router/use/a/b/expert2": 0.75},
        {"step": 3, "loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(tmp_path).expert_use == {"domains": ["a/b"], "use": [[[0.25, 0.0, 0.75]]]}


def test_broken_file_is_named(workdir):
    (workdir / "eval/step_00000200.json").write_text("{")
    with pytest.raises(UserError, match=r"step_00000200.json: cannot be read as JSON"):
        write_report(workdir)
    with pytest.raises(UserError, match="no such run folder"):
        write_report(workdir / "nowhere")


def test_plots_are_the_same_bytes_for_the_same_values():
    use = [[[0.5, 0.5]]]
    assert plots.experts(["a"], use) == plots.experts(["a"], use)
    assert plots.experts(["a"], use) != plots.experts(["a"], [[[0.9, 0.1]]])
