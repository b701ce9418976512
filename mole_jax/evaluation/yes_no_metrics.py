"""Yes-or-no questions about objects, as POPE scores them."""

from __future__ import annotations

from collections.abc import Sequence

from mole_jax.errors import UserError


def yes_no(prediction: str, references: Sequence[str]) -> float:
    """1.0 if `prediction` says what the reference says, yes or no.

    A prediction says no if the first sentence has "No", "no" or "not" as a whole word, between spaces; commas are
    dropped before, and the sentence ends at the first point. Everything else says yes: "NO", an empty answer, any
    other text. Without references 0.0.

    Source: POPE (arXiv 2305.10355), `evaluate.py` of RUCAIBox/POPE and `llava/eval/eval_pope.py` of LLaVA.

    Raises:
        UserError: a reference is neither yes nor no, or one says yes and another no.
    """
    return float(_says_yes(prediction) == _truth(references)) if references else 0.0


def yes_no_numbers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """POPE's numbers over the questions of one split, 0.0 to 1.0, with yes as the positive class.

    Returns:
        accuracy; precision, recall and f1, each 0.0 where nothing was to be divided by; yes_ratio, the share of
        *predictions* that say yes. (The share of references that do is a property of the data, and 0.5 in POPE.)

    Raises:
        UserError: as `yes_no`; and for a question without references.
        ValueError: there is no question, or not one list of references for each prediction.
    """
    pairs = [(_says_yes(said), _truth(truths)) for said, truths in zip(predictions, references, strict=True)]
    if not pairs:
        raise ValueError("yes_no_numbers needs at least one question")
    hits = pairs.count((True, True))
    said_yes = hits + pairs.count((True, False))
    are_yes = hits + pairs.count((False, True))
    precision, recall = _ratio(hits, said_yes), _ratio(hits, are_yes)
    return {
        "accuracy": (hits + pairs.count((False, False))) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": said_yes / len(pairs),
    }


def _says_yes(prediction: str) -> bool:
    sentence = prediction.split(".")[0].replace(",", "")
    return {"No", "no", "not"}.isdisjoint(sentence.split(" "))


def _truth(references: Sequence[str]) -> bool:
    labels = {reference.strip().lower().removesuffix(".") for reference in references}
    if labels not in ({"yes"}, {"no"}):
        raise UserError(f"metric yes_no: the references {list(references)} must be yes, or no; choose another metric")
    return labels == {"yes"}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
