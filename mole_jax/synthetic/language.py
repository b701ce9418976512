"""What is asked and said about a synthetic scene.

The three domains put the same questions and demand different forms of answer: sentences (general), the
exact string or number (document), closed yes/no and clinical terms (biomedical). Captions speak a fourth
language, so that a base pretrained on them sees and spells everything and yet knows no domain's form.
"""

from __future__ import annotations

import numpy as np

from mole_jax.synthetic.draw import COLOURS, SHAPES
from mole_jax.synthetic.scenes import FINDINGS, PLACES, WORDS, Chart, Everyday, Page, Scan, Scene, Thing

DOMAINS = {"general": ("scene",), "document": ("chart", "page"), "biomedical": ("scan",)}
"""The kinds of scene of each domain."""

SHARED = {
    "shown": "What is shown?",
    "count": "How many are there?",
    "what left": "What is on the left?",
    "what middle": "What is in the middle?",
    "what right": "What is on the right?",
    "any left": "Is there something on the left?",
    "any middle": "Is there something in the middle?",
    "any right": "Is there something on the right?",
}
"""Wording that every domain uses, by the kind of question."""

OWN = {
    "scene": {
        "shown": "Which objects stand in this scene?",
        "count": "How many objects stand in this scene?",
        "what left": "Which object stands on the left of this scene?",
        "what middle": "Which object stands in the middle of this scene?",
        "what right": "Which object stands on the right of this scene?",
        "any left": "Does an object stand on the left of this scene?",
        "any middle": "Does an object stand in the middle of this scene?",
        "any right": "Does an object stand on the right of this scene?",
    },
    "chart": {
        "shown": "Which values does the chart have?",
        "count": "How many bars does the chart have?",
        "what left": "Which value does the left bar of the chart have?",
        "what middle": "Which value does the middle bar of the chart have?",
        "what right": "Which value does the right bar of the chart have?",
        "any left": "Does the chart have a left bar?",
        "any middle": "Does the chart have a middle bar?",
        "any right": "Does the chart have a right bar?",
    },
    "page": {
        "shown": "Which word does the page have?",
        "count": "How many numbers does the page have?",
        "what left": "Which number does the page have on the left?",
        "what right": "Which number does the page have on the right?",
        "any left": "Does the page have a number on the left?",
        "any right": "Does the page have a number on the right?",
    },
    "scan": {
        "shown": "Which findings does the scan have?",
        "count": "How many findings does the scan have?",
        "what left": "Which finding does the left lung have?",
        "what middle": "Which size does the heart have?",
        "what right": "Which finding does the right lung have?",
        "any left": "Does the left lung have a finding?",
        "any middle": "Does the heart have a finding?",
        "any right": "Does the right lung have a finding?",
    },
}
"""Wording that gives the domain away, for the same questions with the same answers."""

FULL_INSTRUCTIONS = ("Describe the picture.", "List what you see.", "Give a caption.", "Caption the picture.")
PART_INSTRUCTIONS = ("Describe the {} part.", "Caption the {} part.", "List the {} part.")
SENTENCE_INSTRUCTIONS = ("Write a sentence about the picture.", "Tell about the picture.")
COPY_INSTRUCTIONS = ("Repeat: {}", "Say again: {}", "Write these words: {}")

_COUNTS = ("no", "one", "two", "three")
_WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
_BESIDE = {"left": "at the left side", "middle": "at the middle", "right": "at the right side"}
"""The wording of `sentence`, which no domain uses."""


def kinds(scene: Scene) -> tuple[str, ...]:
    """The kinds of question that can be put about `scene`, keys of `SHARED`."""
    return tuple(kind for kind in SHARED if kind in OWN[scene.kind])


def answer(scene: Scene, kind: str) -> str:
    """The one right answer to a question of `kind`, in the form of the scene's domain."""
    verb, _, place = kind.partition(" ")
    match scene:
        case Everyday():
            return _answer_general(scene, verb, place)
        case Chart() | Page():
            return _answer_document(scene, verb, place)
        case Scan():
            return _answer_biomedical(scene, verb, place)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _thing(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _answer_general(scene: Everyday, verb: str, place: str) -> str:
    things = {name: thing for name, thing in zip(PLACES, scene.things, strict=True) if thing}
    if verb == "count":
        return "There is one object." if len(things) == 1 else f"There are {_COUNTS[len(things)]} objects."
    if verb == "shown":
        return f"There is {_joined([f'{_with_article(_thing(thing))} {_WHERE[at]}' for at, thing in things.items()])}."
    what = _with_article(_thing(things[place])) if place in things else "nothing"
    there = f"here is {what} {_WHERE[place]}."
    return f"T{there}" if verb == "what" else f"{'Yes' if place in things else 'No'}, t{there}"


def _answer_document(scene: Chart | Page, verb: str, place: str) -> str:
    values = _values(scene)
    if verb == "count":
        return str(len(values))
    if verb == "shown":
        return scene.word if isinstance(scene, Page) else " ".join(map(str, values.values()))
    return str(values.get(place, "none"))


def _values(scene: Chart | Page) -> dict[str, int]:
    """The numbers that a document shows, by place."""
    if isinstance(scene, Page):
        values = {"left": scene.left, "right": scene.right}
    else:
        values = {at: bar[1] if bar else None for at, bar in zip(PLACES, scene.bars, strict=True)}
    return {at: value for at, value in values.items() if value is not None}


def _answer_biomedical(scene: Scan, verb: str, place: str) -> str:
    findings = [_lung(side, finding) for side, finding in _sides(scene).items() if finding]
    findings += ["large heart"] * scene.large_heart
    if verb == "count":
        return f"{_COUNTS[len(findings)]} finding{'s' * (len(findings) != 1)}"
    if verb == "shown":
        return _joined(findings) if findings else "normal"
    if place == "middle":
        size = "large" if scene.large_heart else "normal"
        return f"{size} heart" if verb == "what" else ("yes" if scene.large_heart else "no")
    finding = _sides(scene)[place]
    return (finding or "clear") if verb == "what" else ("yes" if finding else "no")


def _sides(scene: Scan) -> dict[str, str | None]:
    return {"left": scene.left, "right": scene.right}


def _lung(side: str, finding: str) -> str:
    return f"{side} {'rib' if finding == 'fracture' else 'lung'} {finding}"


def parts(scene: Scene) -> dict[str, str]:
    """What a caption says of each part of `scene`, in the caption's order."""
    match scene:
        case Everyday():
            said = {at: _thing(thing) if thing else "none" for at, thing in zip(PLACES, scene.things, strict=True)}
            said["count"] = str(sum(thing is not None for thing in scene.things))
            said["back"] = f"{scene.sky} {scene.floor}"
        case Chart():
            said = {at: f"{bar[0]} {bar[1]}" if bar else "none" for at, bar in zip(PLACES, scene.bars, strict=True)}
            said["count"] = str(len(_values(scene)))
        case Page():
            said = {"word": scene.word}
            said |= {at: str(_values(scene).get(at, "none")) for at in ("left", "right")}
            said["count"] = str(len(_values(scene)))
        case Scan():
            heart = "large" if scene.large_heart else "normal"
            said = {"left": scene.left or "clear", "middle": heart, "right": scene.right or "clear"}
            said["count"] = str((scene.left is not None) + (scene.right is not None) + scene.large_heart)
    return said


def caption(scene: Scene) -> str:
    """Everything that `scene` shows, in the caption language."""
    return f"{scene.kind} : {' ; '.join(f'{part} {said}' for part, said in parts(scene).items())}"


def sentence(scene: Scene) -> str:
    """A sentence about `scene`, in a wording that no domain answers in."""
    match scene:
        case Everyday():
            seen = [
                f"{_with_article(_thing(thing))} {_BESIDE[at]}"
                for at, thing in zip(PLACES, scene.things, strict=True)
                if thing
            ]
        case Chart():
            bars = zip(PLACES, scene.bars, strict=True)
            seen = [f"{_with_article(bar[0])} bar of {bar[1]} {_BESIDE[at]}" for at, bar in bars if bar]
        case Page():
            seen = [f"the word {scene.word}"]
            seen += [f"the number {value} {_BESIDE[at]}" for at, value in _values(scene).items()]
        case Scan():
            seen = [f"{_with_article(found)} {_BESIDE[at]}" for at, found in _sides(scene).items() if found]
            seen.append(f"a {'large' if scene.large_heart else 'normal'} heart")
    return f"This {scene.kind} has {_joined(seen)}."


def caption_turn(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """An instruction about `scene` and its answer: mostly the caption, else one part of it or a sentence."""
    draw = rng.random()
    if draw < 0.55:
        return _pick(FULL_INSTRUCTIONS, rng), caption(scene)
    if draw < 0.8:
        said = parts(scene)
        part = _pick(tuple(said), rng)
        return _pick(PART_INSTRUCTIONS, rng).format(part), f"{part} : {said[part]}"
    return _pick(SENTENCE_INSTRUCTIONS, rng), sentence(scene)


def copy_turn(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """An instruction without a picture: say a question, an answer or a few words again.

    So the base meets every word of the domains, in both roles, with no question beside its answer.
    """
    draw = rng.random()
    if draw < 0.25:
        text = _pick(tuple((SHARED if rng.random() < 0.5 else OWN[scene.kind]).values()), rng)
    elif draw < 0.6:
        text = answer(scene, _pick(kinds(scene), rng))
    else:
        text = " ".join(_pick(_LOOSE_WORDS, rng) for _ in range(rng.integers(1, 8)))
    return _pick(COPY_INSTRUCTIONS, rng).format(text), text


_LOOSE_WORDS = (
    *COLOURS, *SHAPES, *FINDINGS, *WORDS, *PLACES, *_COUNTS, *"0123456789", "object", "objects", "nothing", "Yes,",
    "No,", "There", "is", "are", "yes", "lung", "rib", "heart", "clear", "normal", "large", "finding", "findings",
    "on the left", "on the right", "in the middle", "none",
)  # fmt: skip


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
