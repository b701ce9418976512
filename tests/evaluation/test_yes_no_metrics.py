"""POPE's reading of an answer, and its numbers."""

from __future__ import annotations

import pytest

from mole_jax.errors import UserError
from mole_jax.evaluation.yes_no_metrics import yes_no, yes_no_numbers


@pytest.mark.parametrize(
    ("prediction", "says_yes"),
    [
        ("Yes", True),
        ("No", False),
        ("No, there is no dog in the image.", False),
        ("There is not a dog.", False),
        # "no" has to be a whole word.
        ("There is nothing abnormal", True),
        ("I know", True),
        # Only the first sentence counts, and commas don't hide a word.
        ("Yes. There is no doubt", True),
        ("Well,no", True),
        ("Oh, no, never", False),
        # What is neither says yes, and so does what the released script misses.
        ("", True),
        ("NO", True),
        ("Not really", True),
        ("No\nbecause", True),
    ],
)
def test_what_an_answer_says(prediction, says_yes):
    assert yes_no(prediction, ["yes"]) == says_yes
    assert yes_no(prediction, ["no"]) == (not says_yes)


def test_references_as_data_sets_write_them():
    assert yes_no("Yes", [" Yes.\n"]) == yes_no("no", ["NO"]) == yes_no("no", ["no", "No."]) == 1
    assert yes_no("yes", []) == 0


@pytest.mark.parametrize("references", [["maybe"], ["yes", "no"], ["not"]])
def test_other_references_are_refused(references):
    with pytest.raises(UserError, match="must be yes, or no"):
        yes_no("yes", references)


def test_numbers():
    # 3 hits, 1 false alarm, 2 misses, 4 rightly said no.
    said = ["yes"] * 3 + ["yes"] + ["no"] * 2 + ["no"] * 4
    truth = [["yes"]] * 3 + [["no"]] + [["yes"]] * 2 + [["no"]] * 4
    numbers = yes_no_numbers(said, truth)
    precision, recall = 3 / 4, 3 / 5
    assert numbers == pytest.approx(
        {
            "accuracy": 0.7,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            # Of the predictions. lmms-eval takes it from the truth, where it is 0.5 here and says nothing of the model.
            "yes_ratio": 0.4,
        }
    )


def test_numbers_where_there_is_nothing_to_divide_by():
    nobody_said_yes = yes_no_numbers(["no", "no"], [["yes"], ["no"]])
    assert nobody_said_yes == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    nothing_is_yes = yes_no_numbers(["yes"], [["no"]])
    assert nothing_is_yes == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 1}


def test_numbers_need_questions_and_their_references():
    with pytest.raises(ValueError, match="at least one question"):
        yes_no_numbers([], [])
    with pytest.raises(ValueError, match="shorter"):
        yes_no_numbers(["yes"], [])
    with pytest.raises(UserError, match="must be yes, or no"):
        yes_no_numbers(["yes"], [[]])
