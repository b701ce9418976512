"""VQA accuracy and its normalisation against other projects' values (goldens/metrics), and their traps."""

from __future__ import annotations

import json

import pytest

from mole_jax.evaluation.answer_metrics import vqa_accuracy
from mole_jax.evaluation.medical_metrics import closed_strict, open_recall
from mole_jax.evaluation.vqa_normalisation import normalise


def read(goldens, name):
    return json.loads((goldens / "metrics" / name).read_text(encoding="utf-8"))


def test_normalisation_of_axlearn(goldens):
    for case in read(goldens, "vqa_axlearn.json")["normalizer"]:
        assert normalise(case["answer"]) == case["expected"], case["testcase_name"]


def test_accuracy_of_axlearn(goldens):
    for case in read(goldens, "vqa_axlearn.json")["accuracy"]:
        assert vqa_accuracy(case["answer"], case["gt_answers"]) == pytest.approx(case["expected"]), case[
            "testcase_name"
        ]


def test_normalisation_of_mmf(goldens):
    for answer, expected in read(goldens, "evalai_mmf.json")["rows"]:
        if "'s" in answer:
            # mmf's own step for TextVQA parts the possessive from its word. VQAv2's definition leaves apostrophes
            # alone, so this row disagrees with it; but for that space, it holds.
            assert normalise(answer) == expected.replace(" 's", "'s"), answer
        else:
            assert normalise(answer) == expected, answer


def test_normalisation_of_slake(goldens):
    # SLAKE's own normalisation in lmms-eval also drops what is in brackets and reads Chinese. Ours does neither, so
    # only its plain English rows have to agree; what each English row is there for holds under the metrics.
    rows = [(answer, expected) for answer, expected in read(goldens, "slake_normalize_lmms_eval.json")["rows"]]
    english = [(answer, expected) for answer, expected in rows if answer.isascii()]
    assert len(english) == 3
    for answer, expected in english:
        if "(" not in answer:
            assert normalise(answer) == expected, answer
        assert open_recall(answer, [expected]) == 1
    yes = [answer for answer, expected in english if expected == "yes"]
    assert [closed_strict(answer, ["yes"]) for answer in yes] == [1]
    # A Chinese answer is not understood, and so is wrong, never right by accident.
    chinese = [(answer, expected) for answer, expected in rows if expected in ("yes", "no") and not answer.isascii()]
    assert chinese
    assert all(closed_strict(answer, [expected]) == 0 for answer, expected in chinese)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # A mark beside a space anywhere goes without leaving one; so does each mark if a comma parts digits.
        ("well-known, half-done - yes", "wellknown halfdone yes"),
        ("black/white", "black white"),
        ("black/white 1,000", "blackwhite 1000"),
        # Points stay only before a digit; colons and apostrophes stay, for times of day and possessives.
        ("3.5 a.m.", "3.5 am"),
        ("It is 10:30.", "it is 10:30"),
        ("the dog's", "dog's"),
        # Apostrophes come back where the standard's list has the word, even where the word is ambiguous.
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("its hes", "its he's"),
        ("somebody'd", "somebodyd"),
        # Number words end at ten; articles go after the marks.
        ("Ten or eleven", "10 or eleven"),
        ("one-a", "1"),
        (" the\nred\tcar ", "red car"),
    ],
)
def test_normalisation_traps(answer, expected):
    assert normalise(answer) == expected


def test_everything_is_normalised_even_where_all_references_agree():
    # lmms-eval normalises the prediction but not references that are all the same, and so counts these as wrong.
    assert vqa_accuracy("2", ["two"] * 10) == 1
    assert vqa_accuracy("Two.", ["two"] * 10) == 1
    assert vqa_accuracy("isnt", ["isn't"] * 10) == 1


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_leaves_one_reference_out(matches, score):
    # Not min(1, matches / 3), which is 1/3, 2/3 and 1 for one, two and three.
    assert vqa_accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("references", "score"),
    [
        ([], 0),
        # One reference has no others: equality.
        (["Red!"], 1),
        (["blue"], 0),
        # With two or three, three others cannot agree; all that there are have to.
        (["red", "red"], 1),
        (["red", "blue"], 1 / 2),
        (["red", "red", "red"], 1),
        (["red", "blue", "blue"], (0 + 1 / 2 + 1 / 2) / 3),
        # From four on, the definition as it stands.
        (["red"] * 4, 1),
        (["red", "red", "blue", "blue", "blue"], (1 / 3 + 1 / 3 + 3 * 2 / 3) / 5),
    ],
)
def test_accuracy_with_fewer_references(references, score):
    assert vqa_accuracy("red", references) == pytest.approx(score)
