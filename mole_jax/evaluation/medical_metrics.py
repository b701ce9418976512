"""Closed and open questions as LLaVA-Med scores them (arXiv 2306.00890), and a strict score of the closed ones.

Answers are compared after `vqa_normalisation.normalise`. Each metric returns 0.0 to 1.0, the best over the references;
without references, 0.0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mole_jax.evaluation.vqa_normalisation import normalise


def llava_med_closed(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the letters "yes" or "no" occur in `prediction`, and so do a reference's.

    To compare with published numbers only: "normal" has "no" in it, and "CT" is wrong even where the reference is
    "CT", having neither. `closed_strict` is the score to believe.

    Source: `llava/eval/run_eval.py` of microsoft/LLaVA-Med.
    """
    said = normalise(prediction)
    return float(_has_yes_or_no(said) and any(normalise(reference) in said for reference in references))


def closed_strict(prediction: str, references: Sequence[str]) -> float:
    """1.0 if `prediction` gives a reference's answer, by whole words.

    Reference yes or no: the answer is the first word if that is yes or no, else the one of them that is said; an
    answer with neither, or that says both further on, is wrong. Any other reference has to be the whole prediction
    after normalisation, since naming every option would contain the right one too.
    """
    said = normalise(prediction)
    given = _yes_or_no(said)
    truths = {normalise(reference) for reference in references}
    return float(said in truths or given in truths)


def open_recall(prediction: str, references: Sequence[str]) -> float:
    """The share of a reference's words that occur in `prediction`, in any order; 0.0 for a reference of no words.

    Source: arXiv 2306.00890, which scores open questions by the recall of the ground truth's tokens;
    `calculate_f1score` in `llava/eval/eval_metrics/evaluate_metrics.py` of microsoft/LLaVA-Med.
    """
    said = set(_words(prediction))
    return max((_share(said, _words(reference)) for reference in references), default=0.0)


def closed_as_released(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`llava_med_closed` over all questions, averaged as the released script does.

    It leaves a wrong answer out of the mean if it has "yes" or "no" in it, so that the mean is too high.

    Returns:
        as_released: 0.0 to 1.0, 0.0 where no question is left.
    """
    pairs = list(zip(predictions, references, strict=True))
    hits = sum(llava_med_closed(said, truths) for said, truths in pairs)
    evasive = sum(not _has_yes_or_no(normalise(said)) for said, _ in pairs)
    return {"as_released": hits / (hits + evasive) if hits + evasive else 0.0}


def recall_as_released(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`open_recall` over all questions, counted as the released script does.

    It counts a word that was found as often as the prediction says it, so that repeating it raises the share.

    Returns:
        as_released: 0.0 to 1.0, the mean over questions.

    Raises:
        ValueError: there is no question, or not one list of references for each prediction.
    """
    if not predictions:
        raise ValueError("recall_as_released needs at least one question")
    total = 0.0
    for prediction, truths in zip(predictions, references, strict=True):
        said = Counter(_words(prediction))
        total += max((_share_repeated(said, Counter(_words(truth))) for truth in truths), default=0.0)
    return {"as_released": total / len(predictions)}


def _words(text: str) -> list[str]:
    return normalise(text).split()


def _has_yes_or_no(normalised: str) -> bool:
    return "yes" in normalised or "no" in normalised


def _yes_or_no(normalised: str) -> str | None:
    # Apostrophes and colons survive the normalisation.
    words = [word.strip("':") for word in normalised.split()]
    if words and words[0] in ("yes", "no"):
        return words[0]
    said = {"yes", "no"}.intersection(words)
    return said.pop() if len(said) == 1 else None


def _share(said: set[str], sought: list[str]) -> float:
    return sum(word in said for word in sought) / len(sought) if sought else 0.0


def _share_repeated(said: Counter[str], sought: Counter[str]) -> float:
    found = sum(said[word] for word in sought)
    missed = sum(count for word, count in sought.items() if word not in said)
    return found / (found + missed) if found + missed else 0.0
