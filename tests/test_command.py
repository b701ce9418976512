"""``mole-jax``: one command for all, recipes by name, configs in YAML and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mole_jax
from mole_jax import command, recipes
from mole_jax.cli import as_yaml, load_config
from mole_jax.errors import UserError, program
from tests.tiny import ROOT


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; sys.argv[0] = 'mole-jax'; from mole_jax.command import run; run()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, timeout=100)


def test_every_command_of_the_package_is_listed():
    """Each module with a door, told by its last lines, is a command."""
    doors = {
        (file.parent if file.stem == "__main__" else file).stem
        for file in (ROOT / "mole_jax").rglob("*.py")
        if "run_door(main)" in file.read_text() and file.name not in ("command.py", "errors.py")
    }
    assert doors == set(command.DOORS)


@pytest.mark.parametrize("name", command.DOORS)
def test_a_command_is_the_module_of_its_name(name):
    assert callable(command._module(name).main)


def test_the_version_is_that_of_the_project(tmp_path):
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert mole_jax.__version__ == version
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"mole-jax {version}\n")


def test_commands_and_mistakes_name_themselves_as_they_were_called(tmp_path):
    assert "usage: mole-jax convert" in run("convert", "--help", cwd=tmp_path).stdout
    done = run("trian", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: unknown command 'trian', did you mean 'train'? (try mole-jax --help)\n",
    )
    assert program("train") == "python -m mole_jax.train"


def test_recipes_are_listed_and_copied_but_never_over_a_file(tmp_path):
    listed = run("configs", cwd=tmp_path).stdout.splitlines()
    shipped = {file.stem for file in (ROOT / "configs").glob("*.py") if "def get_config()" in file.read_text()}
    assert {line.split()[0] for line in listed} == shipped
    assert run("configs", "llava15_7b_mole", cwd=tmp_path).returncode == 0
    copied = tmp_path / "llava15_7b_mole.py"
    assert copied.read_bytes() == (ROOT / "configs" / "llava15_7b_mole.py").read_bytes()
    again = run("configs", "llava15_7b_mole", cwd=tmp_path)
    assert again.returncode == 2
    assert "is there already; name another with --output" in again.stderr
    with pytest.raises(UserError, match=r"no recipe is called 'llava15_7b_mloe', did you mean 'llava15_7b_mole'"):
        recipes.copy("llava15_7b_mloe", tmp_path / "x.py")


def test_a_recipe_is_known_by_its_name_where_no_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == load_config(str(ROOT / "configs" / "quickstart.py"))
    (tmp_path / "quickstart").write_text("")
    assert recipes.path("quickstart") == "quickstart"


def test_what_print_config_prints_is_read_as_the_same_config(tmp_path):
    rate = ("--optimizer.learning_rate", "1e-3")
    done = run("train", "--config", "llava15_7b_mole", *rate, "--print-config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "mine.yaml").write_text(done.stdout)
    expected = load_config("llava15_7b_mole", rate)
    assert load_config(str(tmp_path / "mine.yaml")) == expected
    (tmp_path / "mine.json").write_text(json.dumps(yaml.safe_load(done.stdout)))
    assert load_config(str(tmp_path / "mine.json")) == expected


def test_a_written_config_changes_what_its_base_says(tmp_path):
    (tmp_path / "half.yaml").write_text("base: quickstart\noptimizer: {learning_rate: 2e-5}\n")
    (tmp_path / "mine.yaml").write_text(
        "base: half.yaml\ntrain:\n  steps: 3\ndata:\n  domains: [{name: a, path: a.json}]\n"
    )
    config, base = load_config(str(tmp_path / "mine.yaml")), load_config("quickstart")
    assert config.optimizer.learning_rate == 2e-5
    assert (config.train.steps, config.train.batch_rows) == (3, base.train.batch_rows)
    assert [domain.name for domain in config.data.domains] == ["a"]
    assert config.model == base.model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected sections such as model, data and train, found list"),
        ("train: {steps: [\n", r"line 2: no YAML \("),
        ("base: 3\n", "base is 3, expected a recipe's name or a file"),
        ("base: mine.yaml\n", "is its own base"),
        ("base: quickstart\ntrain: {stepz: 3}\n", "unknown field 'train.stepz', did you mean 'train.steps'"),
        ("base: quickstart\ntrain: {steps: three}\n", "train.steps expects an integer or None, got 'three'"),
        ("base: quickstrat\n", "no such file 'quickstrat'"),
    ],
)
def test_a_wrong_written_config_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)


def test_yaml_holds_what_a_config_does():
    config = load_config("llava15_7b_mole")
    assert yaml.safe_load(as_yaml(config))["data"]["domains"][0]["name"] == config.data.domains[0].name
