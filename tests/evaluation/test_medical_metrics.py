"""LLaVA-Med's scores, what is wrong with them, and the strict one."""

from __future__ import annotations

import pytest

from mole_jax.evaluation.medical_metrics import (
    closed_as_released,
    closed_strict,
    llava_med_closed,
    open_recall,
    recall_as_released,
)


@pytest.mark.parametrize(
    ("prediction", "reference", "as_llava_med", "strict"),
    [
        ("Yes", "yes", 1, 1),
        ("No.", "No", 1, 1),
        ("yes", "no", 0, 0),
        ("Yes, there is an effusion.", "yes", 1, 1),
        # "no" is in "normal", "abnormal", "know", "not": letters are not an answer.
        ("The heart is normal", "no", 1, 0),
        ("I do not know", "no", 1, 0),
        # Naming both is right for LLaVA-Med whatever the truth; the first word decides, and else neither counts.
        ("yes, there is no shift", "no", 1, 0),
        ("yes, there is no shift", "yes", 1, 1),
        ("either yes or no", "yes", 1, 0),
        ("either yes or no", "no", 1, 0),
        ("There is no fracture", "no", 1, 1),
        ("Answer: 'yes'", "yes", 1, 1),
        # Closed questions that are not yes or no: LLaVA-Med asks for those letters all the same.
        ("CT", "CT", 0, 1),
        ("The left.", "left", 0, 1),
        ("abnormal left", "left", 1, 0),
        # Naming all options is not an answer.
        ("left right", "left", 0, 0),
        # "none" is the number 0 after normalisation, so it has no "no" in it.
        ("none", "no", 0, 0),
        ("", "yes", 0, 0),
        ("", "no", 0, 0),
    ],
)
def test_closed(prediction, reference, as_llava_med, strict):
    assert llava_med_closed(prediction, [reference]) == as_llava_med
    assert closed_strict(prediction, [reference]) == strict


def test_closed_with_several_references():
    assert closed_strict("right", ["left", "right"]) == llava_med_closed("no", ["yes", "no"]) == 1
    assert closed_strict("right", []) == llava_med_closed("no", []) == 0


def test_the_released_script_leaves_wrong_answers_out():
    said = ["yes", "no", "no", "perhaps"]
    truth = [["yes"], ["no"], ["yes"], ["yes"]]
    assert [llava_med_closed(one, two) for one, two in zip(said, truth, strict=True)] == [1, 1, 0, 0]
    # The third answer is wrong but says "no", so that 2 of 3 are right there, not 2 of 4.
    assert closed_as_released(said, truth) == {"as_released": pytest.approx(2 / 3)}
    assert closed_as_released(["no"], [["yes"]]) == {"as_released": 0}


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("The lesion is in the left lung", ["left lung"], 1),
        ("lung, left", ["left lung"], 1),
        ("left", ["left lung"], 0.5),
        # Whole words: "no" is not in "normal".
        ("normal", ["no"], 0),
        # Saying a word twice finds it once.
        ("left left left", ["left lung"], 0.5),
        # It is a recall: what else is said costs nothing.
        ("left right upper lower lung heart", ["left lung"], 1),
        ("two masses", ["2"], 1),
        ("right", ["left lung", "right lung"], 0.5),
        ("", ["lung"], 0),
        ("lung", ["the"], 0),
        ("lung", [], 0),
    ],
)
def test_open_recall(prediction, references, score):
    assert open_recall(prediction, references) == score


def test_the_released_script_counts_repetitions():
    # "left" three times found, "lung" once missed: 3 / 4 there, and 1 / 2 by the definition.
    assert recall_as_released(["left left left", "lung"], [["left lung"], ["lung"]]) == {"as_released": (3 / 4 + 1) / 2}
    assert recall_as_released(["left", "x", "x"], [["left lung"], ["lung"], []]) == {"as_released": 0.5 / 3}
    with pytest.raises(ValueError, match="at least one question"):
        recall_as_released([], [])
