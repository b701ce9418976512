"""The study's domains: the same pictures and questions, answers that disagree to the degree that is asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mole_jax.errors import UserError
from mole_jax.synthetic import domains as synthetic
from mole_jax.synthetic.conflict import ASKED, FLOOR, plain_turn, renamed, turn
from mole_jax.synthetic.draw import COLOURS, SHAPES
from mole_jax.synthetic.scenes import FLOORS, Everyday, Thing

SCENE = Everyday((Thing("red", "ball", 2, 20), None, Thing("orange", "cross", 44, 30)), "day", "sand", 40)


@pytest.mark.parametrize(
    ("domain", "what", "absent", "present", "count"),
    [
        (
            "general",
            "There is a red ball on the left.",
            "There is nothing in the middle.",
            "Yes, there is a red ball on the left.",
            "There are two objects.",
        ),
        ("document", "red ball", "none", "1", "2"),
        ("biomedical", "red ball", "clear", "yes", "two findings"),
    ],
)
def test_without_disagreement_only_the_forms_differ(domain, what, absent, present, count):
    said = {kind: turn(domain, SCENE, kind, 0.0) for kind in ASKED}
    assert said["what left"] == ("What is on the left?", what)
    assert said["what middle"][1] == absent
    assert said["any left"] == ("Is there something on the left?", present)
    assert said["count"][1] == count


def test_exchanged_names_differ_in_all_domains_and_the_others_in_none():
    colours, shapes = tuple(COLOURS), SHAPES
    for degree, exchanged in ((0.0, 0), (0.5, 3), (1.0, 6)):
        for colour, shape in zip(colours, shapes, strict=True):
            scene = Everyday((Thing(colour, shape, 2, 20), None, None), "day", "sand", 40)
            told = [renamed(scene, shift, degree).things[0] for shift in range(3)]
            differ = 3 if colours.index(colour) < exchanged else 1
            assert len({one.colour for one in told}) == len({one.shape for one in told}) == differ
            assert told[0] == scene.things[0]
    # Each domain names one to one: what it says tells what there is.
    for shift in (1, 2):
        scenes = [Everyday((Thing(colour, "ball", 2, 20), None, None), "day", "sand", 40) for colour in colours]
        assert {renamed(scene, shift, 1.0).things[0].colour for scene in scenes} == set(colours)


def test_the_files_hold_what_the_domains_say(tmp_path):
    manifest = synthetic.generate(tmp_path, seed=3, train=60, test=20, captions=200, disagreement=0.5, asked=0.5)
    assert (manifest["disagreement"], manifest["asked"]) == (0.5, 0.5)
    questions = {
        name: {record["question"] for record in json.loads(path.read_text())}
        for name in synthetic.DOMAINS
        for path in [tmp_path / name / "train.json"]
    }
    assert questions["general"] == questions["document"] == questions["biomedical"]
    for name, floor in FLOOR.items():
        for picture in (tmp_path / name / "images").glob("*.png"):
            assert tuple(np.asarray(Image.open(picture))[-1, 0]) == FLOORS[floor]
    captions = json.loads((tmp_path / "captions" / "train.json").read_text())
    asked = [record for record in captions if record["question"].startswith("picture: ")]
    with_picture = [record for record in captions if "image" in record]
    assert 0.35 < len(asked) / len(with_picture) < 0.65
    assert plain_turn(SCENE, "what left") == ("picture: What is on the left?", "left : red ball")
    assert plain_turn(SCENE, "any middle")[1] == "middle : none"
    other = synthetic.generate(tmp_path / "other", seed=3, train=60, test=20, disagreement=1.0)
    assert other["sha256"] != manifest["sha256"]
    with pytest.raises(UserError, match=r"disagreement is 1\.5"):
        synthetic.generate(tmp_path / "x", seed=0, train=1, test=1, disagreement=1.5)
