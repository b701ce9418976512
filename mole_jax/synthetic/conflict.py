"""Three domains that show the same things, ask the same questions and demand different answers.

Each keeps the form of answer of the quickstart's domain of its name. As there, only the picture tells the domain:
things stand on grass in `general`, on sand in `document`, on snow in `biomedical`. A share of the colours' and shapes'
names, the degree of conflict, is exchanged among themselves in `document` and in `biomedical`: what `general` calls a
red ball is a blue box in one and a green cone in the other. So what is learned from one domain is wrong in another, to
the degree that is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mole_jax.synthetic import language
from mole_jax.synthetic.draw import COLOURS, SHAPES
from mole_jax.synthetic.scenes import PLACES, Everyday, Scene, Thing

KIND = "scene"
"""The kind of picture that all domains show."""
ASKED = ("count", "what left", "what middle", "what right", "any left", "any middle", "any right")
"""The kinds of question, keys of `language.SHARED`."""
_COUNTS = ("no", "one", "two", "three")


FLOOR = {"general": "grass", "document": "sand", "biomedical": "snow"}


def placed(scene: Scene, domain: str) -> Everyday:
    """Returns `scene` on the floor of `domain`."""
    assert isinstance(scene, Everyday)
    return dataclasses.replace(scene, floor=FLOOR[domain])


def turn(domain: str, scene: Scene, kind: str, disagreement: float) -> tuple[str, str]:
    """Returns the question of `kind` that `domain` puts about `scene`, and the answer that it demands."""
    assert isinstance(scene, Everyday)
    told = renamed(scene, list(language.DOMAINS).index(domain), disagreement)
    question = language.SHARED[kind]
    if domain == "general":
        return question, language.answer(told, kind)
    verb, _, place = kind.partition(" ")
    thing = told.things[PLACES.index(place)] if place else None
    count = sum(one is not None for one in told.things)
    if domain == "document":
        said = {"count": str(count), "any": str(int(thing is not None)), "what": _name(thing, "none")}
    else:
        present = "yes" if thing else "no"
        findings = f"{_COUNTS[count]} finding{'s' * (count != 1)}"
        said = {"count": findings, "any": present, "what": _name(thing, "clear")}
    return question, said[verb]


def plain_turn(scene: Scene, kind: str) -> tuple[str, str]:
    """Returns a question of `kind` that no domain puts, and its answer in no domain's form, to teach a base."""
    assert isinstance(scene, Everyday)
    verb, _, place = kind.partition(" ")
    thing = scene.things[PLACES.index(place)] if place else None
    count = sum(one is not None for one in scene.things)
    said = {"count": str(count), "any": "none" if thing is None else place, "what": _name(thing, "none")}
    return f"picture: {language.SHARED[kind]}", f"{place or 'count'} : {said[verb]}"


def renamed(scene: Everyday, shift: int, disagreement: float) -> Everyday:
    """Returns `scene` with the names of its things as a domain has them: `shift` places on in the exchanged ones."""

    def thing(one: Thing | None) -> Thing | None:
        if one is None:
            return None
        colour = _exchanged(one.colour, tuple(COLOURS), shift, disagreement)
        return dataclasses.replace(one, colour=colour, shape=_exchanged(one.shape, SHAPES, shift, disagreement))

    left, middle, right = map(thing, scene.things)
    return dataclasses.replace(scene, things=(left, middle, right))


def _exchanged(name: str, names: Sequence[str], shift: int, disagreement: float) -> str:
    exchanged = names[: round(disagreement * len(names))]
    return exchanged[(exchanged.index(name) + shift) % len(exchanged)] if name in exchanged else name


def _name(thing: Thing | None, absent: str) -> str:
    return f"{thing.colour} {thing.shape}" if thing else absent
