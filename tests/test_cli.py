"""Config files and command lines: what is accepted, and the one line that a mistake gets."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from mole_jax.cli import load_config, parse, parse_settings
from mole_jax.config import Config
from mole_jax.errors import UserError

CONFIG = """
from mole_jax.config import *

def get_config() -> Config:
    return Config(
        model=ModelConfig(preset="tiny"),
        data=DataConfig(domains=(DomainConfig("general", "a.json"), DomainConfig("document", "b.json"))),
        optimizer=OptimizerConfig(learning_rate=1),
        train=TrainConfig(steps=3),
    )
"""
DOOR = """
from mole_jax.cli import parse
from mole_jax.errors import run_door

def main():
    config, arguments = parse("train", "Finetunes a model.", extra=lambda parser: parser.add_argument(
        "--workdir", required=True, help="Folder of the run."))
    print(config.train.steps, arguments.workdir)

run_door(main)
"""


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return str(path)


def door(*arguments: str, width: int = 100) -> subprocess.CompletedProcess[str]:
    """Runs a door as a process of its own."""
    environment = os.environ | {"COLUMNS": str(width), "PYTHONIOENCODING": "utf-8"}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", DOOR, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, encoding="utf-8")


def refused(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_are_typed(config_file: str):
    config = load_config(
        config_file,
        [
            *("--optimizer.learning_rate", "1e-4"),
            "--data.domains.1.weight=2",
            *("--train.trainable", "adapters", "router"),
            *("--optimizer.clip_norm", "None"),
            *("--adapter.router_bias", "True"),
            *("--model.base", "None"),
            *("--mesh.data", "-1"),
            *("--adapter.router-gradient", "dense"),
            *("--name", "a run"),
        ],
    )
    assert config.optimizer.learning_rate == 1e-4
    assert [domain.weight for domain in config.data.domains] == [1.0, 2.0]
    assert [domain.path for domain in config.data.domains] == ["a.json", "b.json"]
    assert config.train.trainable == ("adapters", "router")
    assert config.optimizer.clip_norm is None
    assert config.adapter.router_bias is True
    assert config.adapter.router_gradient == "dense"
    assert config.name == "a run"
    assert config.train.steps == 3  # what is not overridden stays


def test_integers_become_floats(config_file: str):
    rate = load_config(config_file).optimizer.learning_rate
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optimizer.lerning_rate", "1"],
            "unknown option '--optimizer.lerning_rate', did you mean '--optimizer.learning_rate'?",
        ),
        (
            ["--data.domains.2.weight", "1"],
            "unknown option '--data.domains.2.weight', did you mean '--data.domains.1.weight'?",
        ),
        (["--train.steps", "many"], "--train.steps expects an integer or None, got 'many'"),
        (["--train.batch_rows", "1.5"], "--train.batch_rows expects an integer, got '1.5'"),
        (["--train.batch_rows"], "--train.batch_rows expects an integer, got nothing"),
        (["--optimizer.b1", "high"], "--optimizer.b1 expects a number, got 'high'"),
        (["--adapter.router_bias", "maybe"], "--adapter.router_bias expects True or False, got 'maybe'"),
        (
            ["--adapter.kind", "moel"],
            "--adapter.kind expects one of none, lora, mole, got 'moel', did you mean 'mole'?",
        ),
        (["--seed", "1", "2"], "--seed expects an integer, got '1 2'"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["steps", "3"], "unexpected argument 'steps', settings are given as --section.field value"),
        (["--train.trainable", "adapter"], "config: train.trainable has 'adapter', did you mean 'adapters'?"),
    ],
)
def test_wrong_overrides_get_one_line(
    config_file: str, capfd: pytest.CaptureFixture, arguments: list[str], message: str
):
    assert refused(config_file, *arguments) == message
    assert capfd.readouterr() == ("", "")  # tyro's own boxed words are not printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no function get_config()"),
        ("get_config = 3", "defines no function get_config()"),
        ("def get_config(): return 3", "get_config() returns 3, expected a mole_jax.config.Config"),
        ("\nimport nothing_of_that_name", ", line 2: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def get_config():\n    return 1 / 0", ", line 2: ZeroDivisionError: division by zero"),
        ("def get_config(:", ", line 1: SyntaxError: "),
        ("import sys\nsys.exit(0)", ", line 2: ends the program (SystemExit); it should only return"),
        ("def get_config():\n    raise SystemExit", ", line 2: ends the program (SystemExit); it should only return"),
        (CONFIG.replace("steps=3", "stepz=3"), ", line 9: TrainConfig has no field 'stepz', did you mean 'steps'?"),
        (
            CONFIG.replace('DomainConfig("general", "a.json")', 'DomainConfig("general", "a.json", wait=2)'),
            "DomainConfig has no field 'wait', did you mean 'weight'?",
        ),
        (
            "import dataclasses\n"
            + CONFIG.replace('ModelConfig(preset="tiny")', "dataclasses.replace(ModelConfig(), bse=1)"),
            "ModelConfig has no field 'bse', did you mean 'base'?",
        ),
        (CONFIG.replace("steps=3", "steps='3'"), ": train.steps expects an integer or None, got '3'"),
        (
            CONFIG.replace("steps=3", "steps=3, trainable=['adapters']"),
            "train.trainable expects a tuple, each text, got",
        ),
        (CONFIG.replace('"a.json"', "7"), ": data.domains.0.path expects text, got 7"),
        (
            CONFIG.replace("TrainConfig(steps=3)", "OptimizerConfig()"),
            ": train expects a TrainConfig, got OptimizerConfig(",
        ),
    ],
)
def test_wrong_config_files_get_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.py"
    path.write_text(text)
    answer = refused(str(path))
    assert answer.startswith(str(path))
    assert message in answer


def test_doors_answer_with_one_line_and_status_2(config_file: str, tmp_path: Path):
    given = ["--config", config_file, "--workdir", "w"]
    absent = str(tmp_path / "no.py")
    for arguments, message in (
        ([*given, "--train.stepps", "4"], "unknown option '--train.stepps', did you mean '--train.steps'?"),
        ([*given[:2], "--wrkdir", "w"], "unknown option '--wrkdir', did you mean '--workdir'?"),
        (["--config", absent, "--workdir", "w"], f"--config: no such file '{absent}'"),
    ):
        ran = door(*arguments)
        assert (ran.returncode, ran.stderr, ran.stdout) == (2, f"error: {message}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config FILE is required (try --help)"),
        (["--confg", "x"], "unknown option '--confg', did you mean '--config'?"),
        (["--config"], "argument --config: expected one argument (try --help)"),
        (["--train-steps", "3"], "unknown option '--train-steps', did you mean '--train.steps'?"),
    ],
)
def test_wrong_flags_get_one_line(arguments: list[str], message: str):
    with pytest.raises(UserError) as caught:
        parse("train", "Finetunes a model.", arguments)
    assert str(caught.value) == message


def test_door_gets_config_and_its_own_flags(config_file: str):
    ran = door("--train.steps", "5", "--config", config_file, "--workdir", "runs/x", "--mesh.data", "-1")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "5 runs/x\n", "")


@dataclasses.dataclass(frozen=True)
class Inner:
    """A part."""

    size: int = 1
    """How large."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a door without a config file."""

    top_k: int | None = None
    """How many."""
    stop: tuple[str, ...] = ()
    """What ends it."""
    kind: Literal["red", "blue"] = "red"
    """Which one."""
    mesh: Inner = Inner()


def settings(*arguments: str) -> Settings:
    def own(parser):
        parser.add_argument("--checkpoint", required=True, help="Where it is.")

    return parse_settings("generate", "Answers.", Settings(kind="blue"), own, arguments)[0]


def test_settings_are_flags_of_either_spelling():
    assert settings("--checkpoint", "c") == Settings(kind="blue")
    given = settings("--top-k", "3", "--checkpoint", "c", "--mesh.size=2", "--kind", "red")
    assert (
        given == settings("--top_k=3", "--mesh.size", "2", "--checkpoint=c", "--kind=red") == Settings(3, mesh=Inner(2))
    )


def test_a_tuple_of_settings_is_a_flag_that_is_repeated():
    assert settings("--checkpoint", "c", "--stop", "a b", "--stop", "", "--stop=--end").stop == ("a b", "", "--end")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --checkpoint (try --help)"),
        (("--chekpoint", "c"), "unknown option '--chekpoint', did you mean '--checkpoint'?"),
        (("--checkpoint", "c", "--top-q", "1"), "unknown option '--top-q', did you mean '--top-k'?"),
        (("--checkpoint", "c", "--top-k", "many"), "--top-k expects an integer or None, got 'many'"),
        (("--checkpoint", "c", "--top-k", "1", "--top_k", "2"), "--top-k is given twice"),
        (("--checkpoint", "c", "--kind", "rad"), "--kind expects one of red, blue, got 'rad', did you mean 'red'?"),
        (("--checkpoint", "c", "--stop", "a", "b"), "--stop expects text, got 'a b'"),
        (("--checkpoint", "c", "--stop", "a", "--stop"), "--stop expects text, got 'a'"),
        (("--checkpoint", "c", "--stop"), "--stop expects text, got nothing"),
    ],
)
def test_wrong_settings_get_one_line(arguments: tuple[str, ...], message: str):
    with pytest.raises(UserError) as caught:
        settings(*arguments)
    assert str(caught.value) == message


def test_help_of_settings_tells_flags_and_docstrings(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        settings("--help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for text in ("Answers.", "--checkpoint", "Where it is.", "--top-k {None}|INT", "How many.", "How large.", "blue)"):
        assert text in told


def every_field(kind: type, prefix: str = "--") -> list[str]:
    """Flags of all fields, found from the classes alone."""
    import typing

    flags = []
    for name, annotation in typing.get_type_hints(kind).items():
        inner = typing.get_args(annotation)[0] if typing.get_origin(annotation) is tuple else annotation
        if dataclasses.is_dataclass(inner):
            flags += every_field(inner, f"{prefix}{name}." + ("0." if inner is not annotation else ""))
        else:
            flags.append(prefix + name)
    return flags


def test_help_tells_every_field(config_file: str):
    ran = door("--help", width=200)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Finetunes a model." in ran.stdout
    assert "Folder of the run." in ran.stdout
    flags = every_field(Config)
    assert "--data.domains.0.image_root" in flags
    for flag in flags:
        assert f"{flag} " in ran.stdout, flag
    for text in (
        "--optimizer.warmup_fraction FLOAT",
        "Share of all steps spent warming up linearly from 0. (default: 0.03)",
        "--adapter.kind {none,lora,mole}",
        "Longest answer, in tokens; at least 1. (default: 32)",
        "optimizer options",
    ):
        assert text in ran.stdout
    with_file = door("--config", config_file, "--help", width=200)
    assert "Optimizer steps. Give this or `epochs`. (default: 3)" in with_file.stdout
    assert "--data.domains.1.path" in with_file.stdout


RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("llava15_*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_fill_their_devices(recipe: Path):
    config = load_config(str(recipe))
    one_device = "int8" in recipe.stem
    assert (config.mesh.data, config.mesh.fsdp) == ((1, 1) if one_device else (-1, 8))
    assert config.train.batch_rows // config.train.accumulation % (1 if one_device else 8) == 0
    assert config.data.sequence_length == 2048
    if "mole" in recipe.stem:
        assert config.adapter.experts == len(config.data.domains) == 3
    if "pretrain" in recipe.stem:
        assert config.train.trainable == ("projector",)
        assert config.data.prompt == "plain"


def test_what_earlier_versions_called_otherwise_is_read(config_file):
    file = Path(config_file)
    file.write_text(
        CONFIG.replace('"b.json"))', '"b.json")), images_per_row=7').replace(
            'preset="tiny"', 'preset="tiny", remat="dots"'
        )
    )
    config = load_config(config_file)
    assert (config.data.tiles_per_row, config.model.remat) == (7, "most")
    config = load_config(config_file, ["--data.images_per_row", "0", "--model.remat=dots"])
    assert (config.data.tiles_per_row, config.model.remat) == (0, "most")
    assert dataclasses.replace(config.data, workers=2).tiles_per_row == 0
