"""CIDEr, ROUGE-L and BLEU as for COCO captions (arXiv 1504.00325), by pycocoevalcap, without its Java tokenizer.

A score of captions belongs to a set of questions: CIDEr weighs a word by how many questions' references have it, and
BLEU is of all the text at once. So each function takes all questions and returns a row of numbers for each; over the
mean row, `bleu_of` makes the score of BLEU, and the other two have one number, whose mean is the score.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mole_jax.errors import UserError

NGRAMS = 4
# What the standard's tokenizer leaves out. Brackets, which it means to leave out too, it does not: they are "-lrb-".
_LEFT_OUT = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
_SENTENCE_END = re.compile(r"(?<!\w\.\w)(\.+)(?=[\s\"')\]]|$)")

Columns = Float[np.ndarray, "Q K"]


def words(caption: str) -> str:
    """Returns the lower-case words of a caption in the Penn Treebank's way, one space apart, without punctuation.

    The standard's tokenizer is Stanford's, in Java. This one agrees with it but for a few abbreviations ("Mr." loses
    its point) and runs of marks ("?!" is left out).

    Raises:
        UserError: the optional libraries are not installed.
    """
    # With a point at the very end, the library does not take the one of a last "U.S." for it.
    text = _SENTENCE_END.sub(r" \1 ", " ".join(caption.split())) + " ."
    found = _library("nltk.tokenize").TreebankWordTokenizer().tokenize(text, convert_parentheses=True)
    return " ".join(word.lower() for word in found if word not in _LEFT_OUT)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Columns:
    """CIDEr-D (arXiv 1411.5726) of each question (Q, 1), 0.0 to 10.0; papers print the mean times 100.

    A word that stands in the references of every question weighs nothing, so a single question has 0.0.
    """
    scorer = _library("pycocoevalcap.cider.cider").Cider()
    return _scores(scorer, predictions, references)


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Columns:
    """ROUGE-L of each question (Q, 1), 0.0 to 1.0: the F measure with beta 1.2 of the longest common subsequence."""
    scorer = _library("pycocoevalcap.rouge.rouge").Rouge()
    return _scores(scorer, predictions, references)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Columns:
    """What BLEU counts in each question (Q, 10): matching n-grams for n = 1 to 4, n-grams said, words said, words of
    the reference that is nearest in length.
    """
    scorer = _library("pycocoevalcap.bleu.bleu_scorer")
    rows = []
    for said, truths in zip(predictions, references, strict=True):
        counts = scorer.cook_test(words(said), scorer.cook_refs([words(truth) for truth in truths]))
        # The shorter of two that are equally near, as the scorer's own sum over questions has it.
        nearest = min((abs(length - counts["testlen"]), length) for length in counts["reflen"])[1]
        rows.append([*counts["correct"], *counts["guess"], counts["testlen"], nearest])
    return np.asarray(rows, np.float64)


def bleu_of(counts: Float[np.ndarray, "*sets 10"]) -> Float[np.ndarray, "*sets"]:
    """Returns BLEU-4, 0.0 to 1.0, of the sums (or means) of `bleu`'s rows over questions.

    The geometric mean of the four precisions, times ``exp(1 - reference / said)`` where less was said than that.
    """
    correct, guessed = counts[..., :NGRAMS], counts[..., NGRAMS : 2 * NGRAMS]
    said, wanted = counts[..., 2 * NGRAMS], counts[..., 2 * NGRAMS + 1]
    precision = correct / np.maximum(guessed, np.finfo(np.float64).tiny)
    brevity = np.exp(np.minimum(0.0, 1 - wanted / np.maximum(said, np.finfo(np.float64).tiny)))
    return np.prod(precision, axis=-1) ** (1 / NGRAMS) * brevity


def _scores(scorer, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Columns:
    said = {i: [words(text)] for i, text in enumerate(predictions)}
    wanted = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    return np.asarray(scorer.compute_score(wanted, said)[1], np.float64)[:, None]


def check_libraries() -> None:
    """Raises `UserError` if the optional libraries are not installed."""
    for name in ("nltk.tokenize", "pycocoevalcap.cider.cider"):
        _library(name)


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"metrics cider, rouge_l and bleu: {error.name} is not installed; pip install 'mole-jax[caption]'"
        ) from None
