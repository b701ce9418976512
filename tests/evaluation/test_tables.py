"""Tables of scores: what a cell says, and the two ways to set a table."""

from __future__ import annotations

import pytest

from mole_jax.evaluation.tables import aligned, markdown, score, score_rows

RESULT = {
    "step": 3,
    "tasks": {
        "captions": {"loss": 1.25, "score": 1.286, "interval": [1.1, 1.4], "metric": "cider", "questions": 8},
        "a|b": {"loss": 2.0, "score": None},
    },
    "abilities": {"ability/visual_reasoning": 0.5, "ability_sum": 3.124},
}


@pytest.mark.parametrize(
    ("task", "cell"),
    [
        ({"score": 0.5, "metric": "anls"}, "50.0 %"),
        ({"score": 0.5, "interval": [0.25, 0.75], "metric": "anls"}, "50.0 % [25.0, 75.0]"),
        # Papers print CIDEr times 100, but it is no percentage: it goes up to 1000.
        ({"score": 1.286, "interval": [1.1, 1.4], "metric": "cider"}, "128.6 [110.0, 140.0]"),
        ({"loss": 1.0, "score": None}, "-"),
    ],
)
def test_a_score_s_cell(task, cell):
    assert score(task) == cell


def test_rows_are_the_tasks_and_then_the_abilities():
    assert score_rows(RESULT)[1:] == [
        ["captions", "cider", "8", "128.6 [110.0, 140.0]", "1.250"],
        ["a|b", "-", "-", "-", "2.000"],
        ["ability/visual_reasoning", "contains", "-", "50.0 %", "-"],
        ["ability_sum", "ability_sum", "-", "312.4", "-"],
    ]


def test_both_ways_have_every_row():
    rows = score_rows(RESULT)
    heading, rule, *lines = markdown(rows).splitlines()
    assert heading == "| task | metric | questions | score | loss |"
    assert rule == "| --- | --- | --- | --- | --- |"
    assert lines[1] == "| a\\|b | - | - | - | 2.000 |", "a pipe in a name must not end its cell"
    assert len(lines) == len(rows) - 1 == len(aligned(rows).splitlines()) - 2
