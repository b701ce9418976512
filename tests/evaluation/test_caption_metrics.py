"""CIDEr, ROUGE-L and BLEU: published values, and the Java tokenizer that they do without."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from mole_jax.errors import UserError
from mole_jax.evaluation.caption_metrics import bleu, bleu_of, words
from mole_jax.evaluation.metrics import bootstrap_interval, check_references, paired_bootstrap, score_answers, score_of

CAPTIONS = [
    "A man (in red) isn't here; he's left.",
    "U.S. flag. Two dogs' toys.",
    "It costs $5.50, or 1,000 cents: 100%!",
    'He said "hello" -- then left...',
    "10:30 a.m.",
    "a black-and-white cat and/or   dog\nby the U.S.",
    "gonna DON'T",
]


def test_cider_of_pix2struct(goldens):
    golden = json.loads((goldens / "metrics" / "pix2struct_metrics.json").read_text())
    rows, numbers = score_answers("cider", golden["predictions"], golden["targets"])
    # Papers print it times 100; the upstream test has one decimal.
    assert 100 * numbers["score"] == pytest.approx(golden["expected_percent"]["cider"], abs=0.05)
    assert score_of("cider", rows).mean() == pytest.approx(numbers["score"])


def test_the_example_of_language_evaluation():
    """The README of bckim92/language-evaluation (MIT): pycocoevalcap with the Java tokenizer on these two captions."""
    said, truth = ["i am a boy", "she is a girl"], [["am i a boy ?"], ["is she a girl ?"]]
    assert score_answers("cider", said, truth)[1]["score"] == pytest.approx(3.333333333333333)
    assert score_answers("rouge_l", said, truth)[1]["score"] == pytest.approx(0.75)
    counts = bleu(said, truth).sum(axis=0)
    matched, said_ngrams = counts[:4], counts[4:8]
    precision = matched / said_ngrams
    assert precision[0] == pytest.approx(0.9999999997500004)
    assert np.sqrt(precision[0] * precision[1]) == pytest.approx(0.5773502690332603)
    # There it is 4e-6 and 1e-8 for want of trigrams in common, which their scorer keeps over 0.
    assert score_answers("bleu", said, truth)[1]["score"] == 0


def test_bleu_of_the_paper():
    """Papineni et al. (2002), section 2: of seven "the", two count; and the brevity penalty of section 2.2.2."""
    the = bleu(["the the the the the the the"], [["The cat is on the mat.", "There is a cat on the mat."]])[0]
    assert (the[0], the[4]) == (2, 7)
    said, truth = "a b c d", "a b c d e f g h"
    assert score_answers("bleu", [said], [[truth]])[1]["score"] == pytest.approx(np.exp(1 - 8 / 4))
    # The reference nearest in length counts, not the first.
    assert score_answers("bleu", [said], [[truth, "a b c d"]])[1]["score"] == pytest.approx(1)


def test_bleu_of_a_set_is_the_library_s():
    rng = np.random.default_rng(0)
    said = [" ".join(rng.choice(list("bcdef"), 7)) for _ in range(40)]
    truth = [[" ".join(rng.choice(list("bcdef"), rng.integers(4, 10))) for _ in range(3)] for _ in said]
    numbered = dict(enumerate(truth)), {i: [text] for i, text in enumerate(said)}
    (*_, expected), (*_, of_each) = Bleu(4).compute_score(*numbered, verbose=0)
    rows, numbers = score_answers("bleu", said, truth)
    assert numbers["score"] == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(np.mean(of_each), rel=0.05), "the score of the set is not the mean of the scores"
    low, high = bootstrap_interval(rows, seed=0, metric="bleu")
    assert low < expected < high
    same = paired_bootstrap(rows, rows, seed=0, metric="bleu")
    assert same == (0, 0, 0, 1)
    better = bleu([truths[0] for truths in truth], truth)
    difference, low, _, p = paired_bootstrap(better, rows, seed=0, metric="bleu")
    assert difference == pytest.approx(1 - expected, rel=1e-6)
    assert (low > 0.3, p < 0.001) == (True, True)


def test_nothing_said_scores_nothing():
    for metric in ("cider", "rouge_l", "bleu"):
        rows, numbers = score_answers(metric, ["", "a dog"], [["a cat"], ["a red dog on the grass"]])
        assert score_of(metric, rows)[0] == 0
        assert np.isfinite(numbers["score"])
    assert bleu_of(np.zeros(10)) == 0


def test_no_java_is_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert score_answers("cider", ["a dog", "a cat"], [["a dog"], ["a bird"]])[1]["score"] > 0


def test_words_are_those_of_the_java_tokenizer():
    if shutil.which("java") is None:
        pytest.skip("needs java, to tokenize as the COCO server does")
    expected = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(CAPTIONS)})
    assert [words(text) for text in CAPTIONS] == [expected[i][0] for i in range(len(CAPTIONS))]


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    for use in (lambda: score_answers("cider", ["a"], [["a"]]), lambda: check_references("bleu", ["a"])):
        with pytest.raises(UserError, match=r"pip install 'mole-jax\[caption\]'"):
            use()
