"""The report says what the files say, in either direction, and names what is not there."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from etils import epath
from PIL import Image
from scipy import stats

from mole_jax.errors import UserError
from mole_jax.study import report
from mole_jax.study.analysis import analyse
from mole_jax.study.results import read
from mole_jax.study.statistics import Estimate

DOMAINS = ("general", "document")
SEEDS = (0, 1, 2, 3, 4)
NOISE = (0.0, 0.02, -0.02, 0.01, -0.01)
"""By seed. Standard error over five seeds: sqrt(0.001 / 4 / 5) = 0.00707; times t(0.975, 4) = 2.776: 0.0196."""
LORA, MOLE = "LoRA r=8", "MoLE E=2 r=8"
PLAN = {
    # mixture, adapter, shares, sections: mean score of (general, document).
    ("general", LORA, (1, 0), ("main",)): (0.50, 0.10),
    ("document", LORA, (0, 1), ("main",)): (0.05, 0.70),
    ("mix", LORA, (1, 1), ("main", "balance")): (0.40, 0.70),
    ("mix", MOLE, (1, 1), ("main", "balance")): (0.48, 0.74),
    ("mix x2", LORA, (2, 2), ("main",)): (0.44, 0.72),
    ("mix", "MoLE, no balance", (1, 1), ("balance",)): (0.45, 0.70),
}
MIX_LORA, MIX_MOLE = f"mix / {LORA}", f"mix / {MOLE}"


def slug(name):
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def arm(mixture, adapter, shares, sections):
    name = f"{mixture} / {adapter}"
    routed = adapter.startswith("MoLE")
    return {
        "name": name,
        "slug": slug(name),
        "mixture": mixture,
        "adapter": adapter,
        "shares": dict(zip(DOMAINS, shares, strict=True)),
        "steps": 100 * sum(shares),
        "trainable": 2345 if routed else 1234,
        "kind": "mole" if routed else "lora",
        "experts": 2 if routed else 1,
        "sections": list(sections),
    }


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_study(folder):
    """Writes a study that is done: mixing costs LoRA 10 points on general and nothing on document."""
    arms = [arm(*key) for key in PLAN]
    study = {
        "name": "made up",
        "domains": DOMAINS,
        "seeds": SEEDS,
        "arms": arms,
        "baseline": LORA,
        "comparisons": [{"a": MIX_MOLE, "b": MIX_LORA}, {"a": MIX_MOLE, "b": f"mix x2 / {LORA}"}],
        "curves": [
            {
                "name": "degree",
                "axis": "conflict",
                "points": [
                    {"value": 0.5, "own": [f"general / {LORA}", f"document / {LORA}"], "mixture": MIX_LORA},
                    {"value": 0.0, "own": [f"general / {LORA}", f"document / {LORA}"], "mixture": MIX_MOLE},
                ],
            }
        ],
        "score": "exact_match",
    }
    write_json(folder / "study.json", study)
    for one, means in zip(arms, PLAN.values(), strict=True):
        # Alone there is no noise, so that differences have exactly that of the mixtures.
        noise = NOISE if one["mixture"].startswith("mix") else [0.0] * 5
        for seed in SEEDS:
            scores = {domain: mean + noise[seed] for domain, mean in zip(DOMAINS, means, strict=True)}
            finish(folder, one, seed, scores)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_study(epath.Path(tmp_path))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The study with its report, not to be changed, and what the terminal shows of it."""
    folder = write_study(epath.Path(tmp_path_factory.mktemp("study")))
    return folder, report.write(folder)


def run_folder(folder, name, seed):
    return folder / "runs" / slug(name) / f"seed_{seed}"


def finish(folder, one, seed, scores, **task):
    inside = run_folder(folder, one["name"], seed)
    tasks = {
        domain: {"loss": 1.5, "score": score, "answer_tokens": 900, "questions": 400, "metric": "anls", **task}
        for domain, score in scores.items()
    }
    write_json(inside / "eval" / f"step_{one['steps']:08d}.json", {"step": one["steps"], "tasks": tasks})
    routed = one["kind"] == "mole"
    write_json(inside / "timing.json", {"step_seconds": 0.25 if routed else 0.2, "batched": 5})
    if routed:
        # The first layer tells the domains apart, the second does not.
        use = [[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]
        write_json(inside / "eval" / "expert_use.json", {"domains": DOMAINS, "use": use})


def rescore(folder, key, scores_by_seed):
    for seed, scores in enumerate(scores_by_seed):
        finish(folder, arm(*key), seed, dict(zip(DOMAINS, scores, strict=True)))


def key_of(name):
    return next(key for key in PLAN if arm(*key)["name"] == name)


def result_of(folder, name):
    return next(found for found in analyse(read(folder)).results if found.arm.name == name)


def values(folder):
    return json.loads((folder / "report.json").read_text())


def lines_of(folder, start):
    return [line for line in (folder / "report.md").read_text().splitlines() if line.startswith(start)]


def test_finding_tells_a_conflict_and_what_routing_gives_back(reported):
    text = " ".join(reported[1].split())
    # Own-domain runs are alike, so differences have the spread NOISE: 2.0 points to either side.
    assert (
        f"On mix, plain {LORA} scores 40.0 against 50.0 alone on general (-10.0 [-12.0, -8.0]) and 70.0 against 70.0 "
        "alone on document (+0.0 [-2.0, +2.0]): a conflict on general; no difference is told on document."
    ) in text
    # Mean of the domains: MoLE 61, LoRA 55 in every seed, alone 60.
    assert (
        f"{MIX_MOLE}: +1.0 [-1.0, +3.0] against the single-domain runs of {LORA} (not told apart); "
        f"+6.0 [+6.0, +6.0] against {MIX_LORA} (above, corrected p <0.0001); "
    ) in text
    assert "missing" not in text


def test_finding_tells_when_the_data_contradict_the_paper(folder):
    rescore(folder, key_of(MIX_LORA), [(0.52 + noise, 0.75 + noise) for noise in NOISE])
    rescore(folder, key_of(MIX_MOLE), [(0.42 + noise, 0.70 - noise) for noise in NOISE])
    text = " ".join(report.write(folder).split())
    assert "no conflict was measured, unlike in the paper; mixing helps on general and document." in text
    kept = f"-4.0 [-4.0, -4.0] against the single-domain runs of {LORA} (below, unlike in the paper)"
    assert f"{MIX_MOLE}: {kept}; -7.5 [-9.5, -5.5] against {MIX_LORA} (below, corrected p " in text
    assert values(folder)["comparisons"][0]["verdict"] == "below"


def test_corrected_p_decides_and_is_scipy_s_times_the_number_of_tests(folder):
    # Differences of the means 0.5, 2.5, 1.5, 4, 1.5 points: clear alone (p 0.03), not as one of two tests.
    wiggle = (0.005, 0.025, 0.015, 0.04, 0.015)
    rescore(folder, key_of(MIX_MOLE), [(0.4 + n + w, 0.7 + n + w) for n, w in zip(NOISE, wiggle, strict=True)])
    rescore(folder, key_of(f"mix x2 / {LORA}"), [(0.4 + w, 0.7 + n + w) for n, w in zip(NOISE, wiggle, strict=True)])
    first, second = analyse(read(folder)).comparisons
    p = stats.ttest_rel(wiggle, [0.0] * 5).pvalue
    assert 0.025 < p < 0.05
    test = first.differences["mean of domains"]
    assert test is not None
    assert test.p == pytest.approx(p)
    assert (first.p, first.verdict) == (pytest.approx(2 * p), "not told apart")
    assert second.verdict == "not told apart"
    assert (first.a.name, first.b.name) == (MIX_MOLE, MIX_LORA)


def test_tables_have_the_numbers_of_the_files(reported):
    folder, printed = reported
    # Two mixed domains go up and down together by seed, so their mean has the spread of one.
    cells = "| 5 | 61.0 [59.0, 63.0] | 48.0 [46.0, 50.0] | 74.0 [72.0, 76.0] | 1.500 | 2,345 | 200 | 1.25x |"
    main, balance = lines_of(folder, f"| {MIX_MOLE} | 5")
    assert main == balance == f"| {MIX_MOLE} {cells}"
    assert lines_of(folder, f"| general / {LORA} | 5")[0].endswith("| 1.500 | 1,234 | 100 | 1.00x |")
    assert all(cell.strip() in printed for cell in cells.strip("| ").split("|"))
    assert "no balance" not in printed, "the terminal shows the main section"
    matrix = lines_of(folder, "| general | ")[0]
    assert matrix == "| general | 30.0 (-30.0 [-30.0, -30.0]) | 50.0 (alone) | 10.0 (-60.0 [-60.0, -60.0]) |"
    expected = "| mix | 55.0 (-5.0 [-7.0, -3.0]) | 40.0 (-10.0 [-12.0, -8.0]) | 70.0 (+0.0 [-2.0, +2.0]) |"
    assert lines_of(folder, "| mix | ") == [expected]
    assert [row["arm"] for row in values(folder)["results"]] == [one["name"] for one in values(folder)["arms"]]
    assert lines_of(folder, "- general: ") == ["- general: 400 questions"]


def test_curve_goes_up_its_axis(reported):
    folder, _ = reported
    at_zero, at_half = values(folder)["curves"]["degree"]
    assert (at_zero["value"], at_half["value"]) == (0.0, 0.5)
    assert at_half["differences"]["general"]["mean"] == pytest.approx(-0.10)
    assert at_zero["differences"]["document"]["mean"] == pytest.approx(0.04)
    assert lines_of(folder, "| 0.5 | ")[0].startswith(
        "| 0.5 | 60.0 [60.0, 60.0] | 55.0 [53.0, 57.0] | -5.0 [-7.0, -3.0]"
    )


def test_expert_use_is_told_by_its_mutual_information(reported):
    folder, _ = reported
    found = {row["arm"]: row for row in values(folder)["experts"]}
    assert set(found) == {MIX_MOLE, "mix / MoLE, no balance"}
    # One bit in the first of two layers.
    assert found[MIX_MOLE]["information"]["mean"] == pytest.approx(math.log(2) / 2)
    assert found[MIX_MOLE]["most"] == pytest.approx(math.log(2))


def test_figures_are_pictures_and_shown(reported):
    folder, _ = reported
    names = {path.name for path in (folder / "plots").iterdir()}
    assert names == {"conflict.png", "scores.png", "curve_degree.png", f"experts_{slug(MIX_MOLE)}.png"}
    page = (folder / "report.md").read_text()
    for name in names:
        assert page.count(f"(plots/{name})") == 1
        assert Image.open(io.BytesIO((folder / "plots" / name).read_bytes())).width > 400


def test_unfinished_runs_are_named_and_the_rest_counts(folder):
    file = run_folder(folder, MIX_MOLE, 1) / "eval" / "step_00000200.json"
    write_json(file.with_name("step_00000150.json"), {**json.loads(file.read_text()), "step": 150})
    file.unlink()
    (run_folder(folder, MIX_MOLE, 2) / "eval" / "step_00000200.json").unlink()
    (run_folder(folder, MIX_MOLE, 3) / "timing.json").unlink()
    text = report.write(folder)
    assert "2 of 30 runs are missing" in " ".join(text.split())
    assert lines_of(folder, f"- {MIX_MOLE} (seed 1)") == [f"- {MIX_MOLE} (seed 1): evaluated at step 150 of 200"]
    assert lines_of(folder, f"- {MIX_MOLE} (seed 2)") == [f"- {MIX_MOLE} (seed 2): no evaluation"]
    assert lines_of(folder, f"- {MIX_MOLE} (seed 3)") == [f"- {MIX_MOLE} (seed 3): no timing.json"]
    # Of the noise 0, 0.01 and -0.01 are left.
    general = next(row for row in values(folder)["results"] if row["arm"] == MIX_MOLE)["scores"]["general"]
    assert (general["mean"], general["seeds"]) == (pytest.approx(0.48), 3)
    assert lines_of(folder, f"| {MIX_MOLE} | 3 of 5 ")
    assert values(folder)["comparisons"][0]["differences"]["general"]["seeds"] == 3


def test_a_study_without_a_finished_run_says_so(folder):
    for file in folder.glob("runs/*/*/eval/step_*.json"):
        file.unlink()
    assert "No run is finished" in report.write(folder)
    assert list((folder / "plots").iterdir()) == []
    assert len(values(folder)["missing"]) == 30


def test_one_seed_is_no_evidence(folder):
    for file in folder.glob("runs/*/seed_[1-4]/eval/step_*.json"):
        file.unlink()
    text = " ".join(report.write(folder).split())
    assert "(-10.0)" in text
    assert "too few seeds are finished to tell on general and document" in text
    assert {one["verdict"] for one in values(folder)["comparisons"]} == {"too few seeds"}


def test_exact_stands_in_where_nothing_was_generated(folder):
    for key in PLAN:
        for seed in SEEDS:
            finish(folder, arm(*key), seed, dict.fromkeys(DOMAINS), exact=0.25)
    assert result_of(folder, MIX_LORA).scores["general"] == Estimate(0.25, (0.25, 0.25), 5)


def test_scores_by_other_metrics_are_not_compared(folder):
    finish(folder, arm(*key_of(MIX_LORA)), 2, dict.fromkeys(DOMAINS), exact=0.25)
    with pytest.raises(UserError, match=f"{MIX_LORA}, seed 2 by exact, exact; evaluate them alike"):
        read(folder)


def test_step_times_of_runs_batched_otherwise_are_not_compared(folder):
    assert result_of(folder, MIX_MOLE).step_time == pytest.approx(0.25 / 0.2)
    for seed in SEEDS:
        write_json(run_folder(folder, MIX_MOLE, seed) / "timing.json", {"step_seconds": 9.0, "batched": 1})
    assert result_of(folder, MIX_MOLE).step_time is None


def test_a_diverged_run_keeps_its_score_and_is_named(folder):
    finish(folder, arm(*key_of(MIX_LORA)), 2, {"general": 0.0, "document": 0.0}, loss=math.nan)
    report.write(folder)
    assert lines_of(folder, f"- {MIX_LORA} (seed 2): the held-out loss on general is nan: training diverged")
    row = next(row for row in values(folder)["results"] if row["arm"] == MIX_LORA)
    assert (row["loss"], row["scores"]["general"]["seeds"]) == (None, 5)
    assert "NaN" not in (folder / "report.json").read_text()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "study.json",
            lambda found: found.pop("baseline"),
            "is not a study's grid .lacks 'baseline'.; delete it and",
        ),
        (
            "study.json",
            lambda found: found["comparisons"].append({"a": "mix / LoRA r=9", "b": MIX_LORA}),
            "no arm is named 'mix / LoRA r=9', did you mean 'mix / LoRA r=8'",
        ),
        ("step_00000200.json", lambda found: found["tasks"].pop("document"), "lacks 'document'.; delete it and"),
        (
            "step_00000200.json",
            lambda found: found["tasks"]["general"].update(score=math.nan),
            "general: score or exact is nan",
        ),
        (
            "step_00000200.json",
            lambda found: found["tasks"]["general"].update(score=None),
            "general: score or exact is None",
        ),
        ("expert_use.json", lambda found: found["use"].pop(), r"use is of shape \(1, 2, 2\)"),
        ("timing.json", lambda found: found.pop("batched"), "is not a timing"),
    ],
)
def test_a_malformed_file_is_named(folder, file, change, message):
    path = next(path for path in sorted(Path(folder).rglob("*.json")) if path.name == file)
    found = json.loads(path.read_text())
    change(found)
    write_json(path, found)
    with pytest.raises(UserError, match=message) as caught:
        report.write(folder)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(UserError, match=file):
        report.write(folder)


def test_a_folder_without_a_study_is_told(tmp_path):
    with pytest.raises(UserError, match=r"holds no study \(study.json\)"):
        report.write(epath.Path(tmp_path))
