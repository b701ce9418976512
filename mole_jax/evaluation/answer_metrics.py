"""Scores of short answers: equality, containment, VQA accuracy, ANLS, relaxed accuracy, multiple choice.

Each takes a prediction and its references and returns 0.0 to 1.0; without references, 0.0.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from mole_jax.errors import UserError
from mole_jax.evaluation.vqa_normalisation import ARTICLES, NUMBERS, normalise


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if `prediction` equals a reference after lower-casing, stripping white space and one full stop."""
    return float(_plain(prediction) in {_plain(reference) for reference in references})


def contains(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the words of a reference stand in `prediction`, whole, in order and side by side.

    Case, punctuation and articles do not count, and number words up to ten are digits. It rewards long answers.

    Source: Tiny LVLM-eHub (arXiv 2308.03729), `tiny_lvlm_evaluation/utils/tools.py` of Multi-Modality-Arena. Unlike
    there, "3" is not in "3.5", apostrophes never matter, and a reference without any word scores only where
    `prediction` has none either (there, an article or a dot as the reference is found in everything).
    """
    said = _words(prediction)
    for reference in references:
        sought = _words(reference)
        if not sought:
            if not said:
                return 1.0
            continue
        # A reference of nothing but an article is the letter of a choice, so there the articles stay.
        bare = _bare(sought)
        if _stands_in(bare or sought, _bare(said) if bare else said):
            return 1.0
    return 0.0


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQAv2 accuracy: the mean, over leaving out each reference in turn, of min(1, matches among the others / 3).

    Prediction and references are always normalised, as visualqa.org/evaluation says; some scripts leave references
    alone where all agree, and then miss "2" for ten times "two". With one reference it is equality; with two or
    three, all of the others have to match, as there are no three.

    Source: VQA (arXiv 1505.00468), `vqaEval.py` of GT-Vision-Lab/VQA.
    """
    said = normalise(prediction)
    matches = [normalise(reference) == said for reference in references]
    if len(matches) < 2:
        return float(any(matches))
    enough = min(3, len(matches) - 1)
    return sum(min(1.0, (sum(matches) - match) / enough) for match in matches) / len(matches)


def anls(prediction: str, references: Sequence[str]) -> float:
    """Best `levenshtein_similarity` to a reference; 0.0 where that is below 0.5.

    At exactly 0.5 the score is 0.5, as in the competitions' own script. The formula of the paper and some code that
    follows it (UReader's) give 0 there.

    Source: ST-VQA (arXiv 1905.13648) and DocVQA (arXiv 2007.00398), evaluation script of rrc.cvc.uab.es.
    """
    best = max((levenshtein_similarity(prediction, reference) for reference in references), default=0.0)
    return best if best >= 0.5 else 0.0


def levenshtein_similarity(first: str, second: str) -> float:
    """1 - (edit distance / length of the longer), 0.0 to 1.0; two empty texts are alike.

    Case does not count, nor white space at the ends or how much of it stands between words. Whether there is
    any between them does.
    """
    first, second = " ".join(first.lower().split()), " ".join(second.lower().split())
    if not first and not second:
        return 1.0
    row = list(range(len(second) + 1))
    for done, letter in enumerate(first, start=1):
        above, row = row, [done]
        for at, other in enumerate(second):
            row.append(min(above[at + 1] + 1, row[at] + 1, above[at] + (letter != other)))
    return 1 - row[-1] / max(len(first), len(second))


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 if a number within 5 % of a reference, or equal to one without regard to case and outer white space.

    "%" divides by 100. Numbers with thousands separators are text. Nothing is within 5 % of 0, so that a
    reference of 0 is compared as text, and "0.0" is wrong.

    Source: ChartQA (arXiv 2203.10244, section 5.1), `pix2struct/metrics.py` of google-research/pix2struct.
    """
    return float(any(_relaxed(prediction.strip(), reference.strip()) for reference in references))


def science_qa(prediction: str, references: Sequence[str]) -> float:
    """1.0 if `prediction` names the letter of a reference, A to E.

    A letter is named by itself, as "B. " at the start, or by "The answer is B" anywhere, first with a full stop
    after it and then without; line breaks count as ". ". Case matters, and a bare "B." names nothing.

    Source: `llava/eval/eval_science_qa.py` of haotian-liu/LLaVA; ScienceQA (arXiv 2209.09513).

    Raises:
        UserError: a reference names no letter.
    """
    truths = [_choice(reference) for reference in references]
    if None in truths:
        raise UserError(
            f"metric science_qa: the reference '{references[truths.index(None)]}' names no choice; "
            "it must be a letter A to E, start with 'X. ' or say 'The answer is X.'"
        )
    return float(_choice(prediction) in truths)


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").strip()


_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation.replace("'", ""), " ") | {"'": ""})


def _words(text: str) -> list[str]:
    """Lower-case words; punctuation parts words, save an apostrophe and a point or comma inside a number."""
    words: list[str] = []
    for word in text.lower().split():
        core = word.strip(string.punctuation)
        number = core.replace(",", "").replace(".", "", 1)
        words += [core.replace(",", "")] if number.isdigit() else core.translate(_TO_SPACE).split()
    return [NUMBERS.get(word, word) for word in words]


def _bare(words: list[str]) -> list[str]:
    return [word for word in words if word not in ARTICLES]


def _stands_in(sought: list[str], said: list[str]) -> bool:
    return any(said[start : start + len(sought)] == sought for start in range(len(said) - len(sought) + 1))


def _relaxed(prediction: str, reference: str) -> bool:
    number, target = _number(prediction), _number(reference)
    if number is None or not target:
        return prediction.lower() == reference.lower()
    # 1.05 is within 5 % of 1, though not in binary.
    return abs(number - target) / abs(target) <= 0.05 + 1e-9


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    # "nan" and "infinity" are words here.
    return value if math.isfinite(value) else None


_CHOICES = (re.compile(r"^([A-E])\. "), re.compile(r"The answer is ([A-E])\."), re.compile(r"The answer is ([A-E])"))


def _choice(text: str) -> str | None:
    text = text.replace("\n", ". ")
    if text.strip() in set("ABCDE"):
        return text.strip()
    found = (pattern.search(text) for pattern in _CHOICES)
    return next((match[1] for match in found if match), None)
