"""Every file of a run, spoilt: the next command recovers and says so, or stops with one line; no traceback, no gap."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mole_jax.errors import UserError
from mole_jax.evaluation import report
from mole_jax.training.telemetry import record_events
from tests import tiny
from tests.chaos import doors, spoiling
from tests.chaos.conftest import OPTIONS
from tests.chaos.results import check_same

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos_files")]

FILES = (
    "config.json",
    "inputs.json",
    "trainable.json",
    "metrics.jsonl",
    "data_report.json",
    "eval/step_00000000.json",
    "eval/step_00000000.md",
    "eval/step_00000000/general.jsonl",
    "eval/step_00000006.json",
    "eval/expert_use.json",
    "plots/losses.png",
    "report.html",
    "tokenizer.model",
    ".lock",
    "tensorboard/*",
)
FOLDERS = ("eval", "eval/step_00000006", "plots", "tensorboard", "checkpoints", "base")
READ_BY_ALL = ("tokenizer.model", "base/checkpoints/0/meta/metadata", "base/checkpoints/0/params/manifest.ocdbt")
"""What every command reads that opens a run."""
QUESTION = ("--question", "What is on the right?", "--max-new-tokens", "4")


def spoilt(*names: str):
    """Marks a test to be made of each of these files in each way."""
    cases = [(name, way) for name in names for way in spoiling.ways(name)]
    return pytest.mark.parametrize(("name", "way"), cases, ids=[f"{name}-{way.__name__}" for name, way in cases])


def spoil(folder: Path, name: str, way: spoiling.Spoil) -> None:
    (path,) = folder.glob(name)
    way(path)


def word_on(name: str, said: doors.Said, workdir: Path) -> bool:
    """Tells whether the command or its report says something of a file."""
    page = (workdir / "report.html").read_text() if (workdir / "report.html").is_file() else ""
    return name in said.err or name in page.rpartition("<h2>Left out</h2>")[2]


@spoilt(*FILES)
def test_train_goes_on_or_says_why_not(config, whole, stopped, name, way):
    spoil(stopped, name, way)
    done = doors.here("train", "--config", config, "--workdir", stopped)
    if done.status:
        assert str(stopped) in done.line
        return
    try:
        check_same(stopped, whole)
    except (AssertionError, OSError, ValueError):
        assert word_on(name, done, stopped), "a gap that nobody is told of"
    if name in ("config.json", "metrics.jsonl", "inputs.json") and way is spoiling.gone:
        assert word_on(name, done, stopped)


@pytest.mark.parametrize("name", FOLDERS)
def test_train_meets_a_file_where_its_folder_belongs(config, whole, stopped, name):
    shutil.rmtree(stopped / name)
    (stopped / name).write_text("hello")
    done = doors.here("train", "--config", config, "--workdir", stopped)
    if done.status:
        assert str(stopped) in done.line
    else:
        check_same(stopped, whole)


@pytest.mark.parametrize("way", spoiling.JSON, ids=lambda way: way.__name__)
def test_the_count_of_the_epochs(data, tmp_path, way):
    options = {**OPTIONS, "train": {"steps": None, "epochs": 0.5}, "evaluation": {"tasks": ()}}
    config, workdir = tiny.write_config(tmp_path / "config.py", data, **options), tmp_path / "run"
    assert doors.here("train", "--config", config, "--workdir", workdir).status == 0
    before = json.loads((workdir / "epoch.json").read_text())
    way(workdir / "epoch.json")
    done = doors.here("train", "--config", config, "--workdir", workdir)
    if done.status:
        assert "epoch.json" in done.line
    else:
        assert json.loads((workdir / "epoch.json").read_text()) == before


def refused(function: Callable[..., object], *arguments: object) -> str | None:
    """Returns the line of the `UserError` that a call ends with, or None."""
    try:
        function(*arguments)
    except UserError as error:
        return doors.Said(2, "", f"error: {error}").line
    return None


@pytest.mark.parametrize("way", spoiling.JSON, ids=lambda way: way.__name__)
def test_events(tmp_path, way):
    """bad_steps.jsonl and routing_events.jsonl: lines of before are kept, or the file is named."""
    file = tmp_path / "bad_steps.jsonl"
    record_events(file, 1, [{"loss": "nan"}])
    way(file)
    if not (said := refused(record_events, file, 2, [{"loss": "nan"}])):
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] in ([1, 2], [2])
    else:
        assert str(file) in said


@spoilt("config.json", "metrics.jsonl", "eval/step_00000006.json", "eval/expert_use.json", "data_report.json")
def test_the_report(copy, name, way):
    whole = report.write_report(copy).read_text()
    spoil(copy, name, way)
    if said := refused(report.write_report, copy):
        assert str(copy) in said
        return
    page = (copy / "report.html").read_text()
    assert page == whole or Path(name).stem.split("_0")[0] in page.rpartition("Left out")[2]


def ask(door: str, config: Path, run: Path, output: Path) -> doors.Said:
    arguments = {
        "evaluate": ("--config", config, "--checkpoint", run, "--workdir", output),
        "routing": ("--config", config, "--checkpoint", run, "--workdir", output),
        "generate": ("--checkpoint", run, *QUESTION),
        "convert": ("--input", run, "--output", output, "--to", "hf"),
    }
    return doors.here(door, *arguments[door])


def outcome(door: str, said: doors.Said, output: Path) -> object:
    """What a command made, without names of folders."""
    if door == "generate":
        return said.out
    if door == "convert":
        return {file.name: file.read_bytes() for file in output.iterdir()}
    found = json.loads((output / {"evaluate": "eval/step_00000006.json", "routing": "routing.json"}[door]).read_text())
    return {name: value for name, value in found.items() if name != "checkpoint"}


@pytest.fixture(scope="module")
def outcomes(config, whole, tmp_path_factory):
    """What each command makes of the whole run."""
    found = {}
    for door in ("evaluate", "generate", "convert", "routing"):
        output = tmp_path_factory.mktemp("outcome") / "out"
        said = ask(door, config, whole, output)
        assert said.status == 0, said
        found[door] = outcome(door, said, output)
    return found


@pytest.mark.parametrize("way", spoiling.ANY, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", READ_BY_ALL)
@pytest.mark.parametrize("door", ["evaluate", "generate", "convert", "routing"])
def test_who_opens_the_run(config, copy, outcomes, tmp_path, door, name, way):
    spoil(copy, name, way)
    said = ask(door, config, copy, tmp_path / "out")
    if said.status:
        assert said.line
    elif outcome(door, said, tmp_path / "out") != outcomes[door]:
        # Weights alone can be converted; that the tokenizer is not among what was written is said.
        assert (door, name) == ("convert", "tokenizer.model")
        assert "without a tokenizer" in said.out


@pytest.mark.parametrize("way", spoiling.ANY, ids=lambda way: way.__name__)
@pytest.mark.parametrize("door", ["evaluate", "generate", "convert", "routing"])
def test_who_opens_the_run_needs_no_other_file(config, copy, outcomes, tmp_path, door, way):
    """All files that the trials above do not spoil one by one, spoilt at once."""
    for name in FILES:
        if name not in READ_BY_ALL:
            spoil(copy, name, way)
    said = ask(door, config, copy, tmp_path / "out")
    assert said.status == 0, said
    made, wanted = outcome(door, said, tmp_path / "out"), outcomes[door]
    if isinstance(made, dict) and isinstance(wanted, dict) and door == "convert":
        # The model card tells of the run what can be read of it.
        assert made.pop("README.md") != wanted["README.md"]
        assert {**made, "README.md": wanted["README.md"]} == wanted
        gone = way in (spoiling.gone, spoiling.a_folder, spoiling.a_dangling_link)
        assert said.mentions("config.json: ") != gone
    else:
        assert made == wanted


@pytest.mark.parametrize("way", spoiling.JSON, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["eval/step_00000006.json", "eval/step_00000006/general.jsonl"])
def test_a_comparison(copy, whole, name, way):
    unspoilt = doors.here("evaluate", "--compare", whole, whole)
    assert unspoilt.status == 0, unspoilt
    spoil(copy, name, way)
    said = doors.here("evaluate", "--compare", copy, whole)
    if said.status:
        assert str(copy) in said.line
    elif way in (spoiling.gone, spoiling.a_dangling_link) and name == "eval/step_00000006.json":
        assert "eval/step_00000000.json" in said.out, "it says which evaluation it compares"
    else:
        assert said.out.replace(str(copy), str(whole)) == unspoilt.out


@pytest.mark.parametrize("way", spoiling.JSON, ids=lambda way: way.__name__)
def test_answers_of_an_evaluation_that_was_killed(config, whole, outcomes, tmp_path, way):
    """The answers that are there already, spoilt: asked again, or the file is named."""
    file = tmp_path / "out" / "eval" / "step_00000006" / "general.partial.jsonl"
    file.parent.mkdir(parents=True)
    pins = json.loads((whole / "eval" / "step_00000006.json").read_text())["tasks"]["general"]["pins"]
    file.write_text(json.dumps({"pins": pins}) + "\n" + json.dumps({"id": "x", "prediction": "y"}) + "\n")
    way(file)
    said = ask("evaluate", config, whole, tmp_path / "out")
    if said.status:
        assert "general.partial.jsonl" in said.line
    else:
        assert outcome("evaluate", said, tmp_path / "out") == outcomes["evaluate"]
