"""Broken records of every layout: one line each that names layout, file, record, field, and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from mole_jax.data.layouts.table import LAYOUTS
from mole_jax.data.records import parse_record
from mole_jax.errors import UserError

ASK: dict[str, Any] = {"role": "user", "content": "q"}
SAY: dict[str, Any] = {"role": "assistant", "content": "a"}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MARKED = [{"from": "user", "value": "<image>"}, {"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
QA = {"question": "q", "answer": "a"}
PMC = {"Question": "q", "Figure_path": "a.jpg"} | {f"Choice {letter}": f"{letter}: {letter * 3}" for letter in "ABCD"}


def asked(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, SAY]}


IMAGE = {"type": "image"}
BROKEN: list[tuple[str, dict[str, Any], str, str]] = [
    ("sharegpt", {"images": ["a"]}, "conversations", "missing; add the list of turns"),
    (
        "sharegpt",
        {"conversations": TURNS, "images": ["a.png"]},
        "images",
        "1 image(s) but 0 <image> in the text; write",
    ),
    ("sharegpt", {"conversations": TURNS, "images": [None]}, "images[0]", "expected a path, found null"),
    ("sharegpt", {"conversations": TURNS, "system": 3.5, "images": {}}, "images", "expected a path, found an object"),
    ("sharegpt", {"conversations": TURNS, "system": ["x"]}, "system", "expected text, found a list"),
    ("messages", {}, "messages", "missing; add the list of messages"),
    ("messages", {"messages": "hello"}, "messages", "expected a list of messages, found text"),
    ("messages", {"messages": ["q", "a"]}, "messages[0]", "expected an object with role and content, found text"),
    ("messages", {"messages": [{"content": "q"}, SAY]}, "messages[0].role", "found null; add who speaks"),
    (
        "messages",
        {"messages": [{**ASK, "role": "usr"}, SAY]},
        "messages[0].role",
        "unknown role 'usr', did you mean 'u",
    ),
    ("messages", {"messages": [ASK, {**SAY, "role": "tool"}]}, "messages[1].role", "unknown role 'tool'"),
    ("messages", {"messages": [ASK, {"role": "assistant"}]}, "messages[1].content", "missing; fill it in or take"),
    ("messages", {"messages": [ASK, {**SAY, "content": {}}]}, "messages[1].content", "expected text, found an object"),
    (
        "messages",
        {"messages": [ASK, {**SAY, "loss": 0.5}]},
        "messages[1].loss",
        "is 0.5, an answer is trained on or not; write 0 or 1",
    ),
    ("messages", {"messages": [ASK, ASK]}, "messages[1].role", "two turns of one side follow each other"),
    ("messages", {"messages": [ASK]}, "messages", "needs a question and an answer"),
    ("messages", {"messages": []}, "messages", "needs a question and an answer"),
    ("messages", asked("q"), "messages[0].content[0]", "expected an object with type, found text"),
    ("messages", asked({"type": "video"}), "messages[0].content[0].type", "is 'video', expected one of text, image"),
    ("messages", asked({"type": "text"}), "messages[0].content[0].text", "missing; fill it in or take the part out"),
    ("messages", asked(IMAGE), "messages[0].content[0]", "stands for image 0 of 'images', which has 0; add it there"),
    ("messages", asked({**IMAGE, "index": -1}), "messages[0].content[0].index", "expected the number of an image"),
    ("messages", asked({"type": "image_url"}), "messages[0].content[0].image_url", "expected a path, found null"),
    ("messages", asked({**IMAGE, "image": 3}), "messages[0].content[0].image", "expected a path, found a number"),
    (
        "messages",
        {**asked(IMAGE, {"type": "text", "text": "q"}), "images": ["a", "b"]},
        "images",
        "2 image(s) but 1 <image> in the text",
    ),
    ("prompt_completion", {"prompt": "q"}, "completion", "missing; fill it in"),
    (
        "prompt_completion",
        {"prompt": [ASK], "completion": "a"},
        "completion",
        "is no list of messages, which the other",
    ),
    ("prompt_completion", {"prompt": " ", "completion": "a"}, "prompt", "the text is empty"),
    ("alpaca", {"instruction": None, "output": "a"}, "instruction", "missing; fill it in"),
    ("alpaca", {"instruction": "q", "output": ""}, "output", "the text is empty; fill it in"),
    ("alpaca", {"instruction": "q", "output": "a", "images": ["a"]}, "images", "1 image(s) but 0 <image>"),
    ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, "history", "expected a list of pairs"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, "history[0]", "write [question, answer]"),
    (
        "m3it",
        {"instruction": "q", "outputs": "a", "img_str": 3},
        "img_str",
        "expected an image in base64, found a number",
    ),
    ("m3it", {"instruction": "q", "outputs": True}, "outputs", "expected text, found a truth value"),
    ("query_response", {"query": "q", "response": None}, "response", "missing; fill it in"),
    (
        "query_response",
        {"query": "q", "response": "a", "images": [""]},
        "images[0]",
        "the path is empty; leave the field",
    ),
    ("chartqa", {"query": "q", "label": [], "imgname": "a.png"}, "label", "the list is empty"),
    ("chartqa", {"query": "q", "label": [None], "imgname": "a.png"}, "label[0]", "expected text, found null"),
    ("pmc_vqa", {**PMC, "Answer": "E"}, "Answer", "is neither a letter of A, B, C, D nor the text of a choice"),
    ("pmc_vqa", {k: v for k, v in PMC.items() if k != "Choice C"} | {"Answer": "A"}, "Choice C", "missing"),
    ("pmc_vqa", PMC, "Answer", "missing; fill it in"),
    ("vqa_rad", {**QA, "image_name": 3}, "image_name", "expected a path, found a number"),
    ("slake", {**QA, "question": "", "img_name": "a"}, "question", "the text is empty"),
    ("path_vqa", {**QA, "image": {"x": 1}}, "image", "an object without bytes and path; write the path itself"),
    ("question_answer", {"question": "q", "answer": float("nan")}, "answer", "missing; fill it in"),
    ("question_answer", {"question": ["q"], "answer": "a"}, "question", "expected text, found a list"),
    ("question_answer", {"question": "q", "answers": []}, "answers", "expected a list of texts"),
    (
        "question_answer",
        {**QA, "image": {"bytes": None, "path": None}},
        "image",
        "both its bytes and its path are null; fill one in",
    ),
    ("question_answer", {**QA, "answer": "half \ud83d"}, "answer", "is the lone surrogate"),
    ("caption", {"image": None, "text": "a"}, "images", "missing; a caption needs its image"),
    ("caption", {"image": "a.png", "caption": []}, "caption", "the list is empty"),
    ("caption", {"image": "a.png", "caption": "An <image>"}, "image", "1 image(s) but 2 <image>"),
    ("ureader", {"image": [], "conversations": MARKED}, "image", "0 image(s) but 1 <image>"),
    ("ureader", {"image": ["a"], "conversations": MARKED[:2]}, "conversations", "needs a question and an answer"),
]


@pytest.mark.parametrize(("layout", "raw", "field", "problem"), BROKEN)
def test_a_broken_record_is_told_in_one_line(layout, raw, field, problem):
    with pytest.raises(UserError) as caught:
        parse_record(raw, file="d.json", index=7, domain="d", layout=LAYOUTS[layout])
    told = str(caught.value)
    assert told.startswith(f"d.json: record 7 (id '7'), field {field} of layout {layout}: ")
    assert problem in told
    assert ";" in told or "expected" in told or "did you mean" in told
    assert "\n" not in told


def test_every_layout_has_one():
    assert {layout for layout, *_ in BROKEN} | {"llava"} == set(LAYOUTS)
