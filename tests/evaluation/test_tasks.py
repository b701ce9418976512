"""Tasks as a config declares them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mole_jax import cli, config, config_json
from mole_jax.config import DecodingConfig
from mole_jax.config_check import check
from mole_jax.errors import UserError
from mole_jax.evaluation.metrics import METRIC_VERSIONS
from tests import tiny
from tests.evaluation import checkpoints


def with_task(**change):
    found = tiny.config(Path("data"))
    tasks = (dataclasses.replace(found.evaluation.tasks[0], **change),)
    return dataclasses.replace(found, evaluation=dataclasses.replace(found.evaluation, tasks=tasks))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ability": "visual_reasoning"}, "general has ability visual_reasoning with metric exact_match"),
        ({"decoding": DecodingConfig(temperature=-1)}, "general.decoding.temperature is -1, it must not be negative"),
        ({"decoding": DecodingConfig(max_new_tokens=0)}, "general.decoding.max_new_tokens is 0, it must be at least 1"),
        ({"limit": 0}, "general has limit 0, it must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(change, problem):
    with pytest.raises(UserError, match=rf"config: evaluation\.tasks: {problem}"):
        check(with_task(**change))


def test_a_task_goes_through_json_unchanged():
    found = check(
        with_task(
            metric="contains",
            ability="visual_commonsense",
            suffix="\nBriefly.",
            decoding=DecodingConfig(temperature=0.5, stop=("\n",)),
        )
    )
    assert config_json.from_json(config_json.to_json(found)) == found


def test_a_task_can_be_changed_on_the_command_line(tmp_path):
    file = tiny.write_config(tmp_path / "config.py", tmp_path)
    flags = ["--evaluation.tasks.1.decoding.temperature", "0.5", "--evaluation.tasks.1.suffix", "Briefly."]
    changed = cli.load_config(str(file), flags).evaluation.tasks[1]
    assert (changed.decoding.temperature, changed.decoding.max_new_tokens, changed.suffix) == (0.5, 4, "Briefly.")
    with pytest.raises(UserError, match=r"--evaluation.tasks.0.metric expects one of .*, did you mean 'cider'"):
        cli.load_config(str(file), ["--evaluation.tasks.0.metric", "ciderd"])


def test_every_command_of_the_documentation_runs_in_a_test():
    used = ("--checkpoint", "mole_jax.convert", "--compare")
    assert [sum(word in line for word in used) for line in checkpoints.commands()] == [1, 1, 1]


def test_the_example_of_the_documentation_is_a_config():
    page = (tiny.ROOT / "docs" / "evaluation.md").read_text()
    evaluation = eval(page.split("```python\n")[1].split("```")[0], vars(config))
    found = check(dataclasses.replace(tiny.config(Path("data")), evaluation=evaluation))
    assert [task.metric for task in found.evaluation.tasks] == ["vqa_accuracy", "cider", "yes_no"]
    assert found.evaluation.tasks[0].suffix.startswith("\nAnswer")
    assert all(f"`{name}`" in page for name in METRIC_VERSIONS), "the page has every metric"
