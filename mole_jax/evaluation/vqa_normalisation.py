"""The answer normalisation of VQAv2, which LLaVA-Med and Tiny LVLM-eHub use too."""

from __future__ import annotations

import re

ARTICLES = frozenset({"a", "an", "the"})
_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_TO_TEN)}
"""Number words and "none", as digits. Larger ones and compounds stay words."""

# Apostrophes and colons are not here: they belong to possessives and to times of day.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED = re.compile(r"\d,\d")
_POINT = re.compile(r"\.(?!\d)")

# Words that are another word without their apostrophe (id, ill, its, shell, well, were) are not in the standard's list.
_WORDS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've
"""


def _without_one(word: str) -> list[str]:
    """The spellings of `word` that lack one of its apostrophes."""
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {bad: word for word in _WORDS.split() for bad in _without_one(word)}
# The standard's list takes this one the wrong way round; scores are only comparable with it.
_CONTRACTIONS["somebody'd"] = "somebodyd"


def normalise(answer: str) -> str:
    """Returns `answer` as VQAv2 compares it: the words that count, in lower case, one space apart.

    In this order: a punctuation mark becomes a space, or nothing if it stands beside a space anywhere in the
    answer or the answer has a comma between digits; points go, save before a digit; number words up to ten
    become digits ("none" is 0); "a", "an" and "the" go; contractions get the apostrophe they lack.

    Source: visualqa.org/evaluation and `vqaEval.py` of GT-Vision-Lab/VQA.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    grouped = _GROUPED.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        # Asked of the answer as it came, not of what earlier marks have left of it.
        beside_space = mark + " " in text or " " + mark in text
        plain = plain.replace(mark, "" if grouped or beside_space else " ")
    words = [NUMBERS.get(word, word) for word in _POINT.sub("", plain).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
