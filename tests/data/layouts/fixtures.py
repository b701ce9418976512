"""Two records of each layout, in the form in which its authors ship it, and what they mean."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

PICTURES = ("a.png", "b.png")


def png(colour: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


BASE64 = base64.b64encode(png()).decode()
ASKED = "<image>\nIs it red?"

Meant = tuple[list[tuple[str, str]], tuple[Any, ...]]
"""Roles and texts of the turns, and the images."""
ONE: Meant = ([("user", ASKED), ("assistant", "yes")], ("a.png",))
TEXT: Meant = ([("user", "What?"), ("assistant", "This.")], ())
SYSTEM: Meant = (
    [("system", "Be brief."), ("user", ASKED), ("assistant", "yes"), ("user", "Sure?"), ("assistant", "Yes.")],
    ("a.png",),
)
EMBEDDED: Meant = (ONE[0], (f"data:;base64,{BASE64}",))
PMC: Meant = (
    [("user", "<image>\nWhich organ?\nA. Lung\nB. Heart\nC. Liver\nD. Brain"), ("assistant", "B")],
    ("PMC1_1.jpg",),
)
_CHOICES = {"Choice A": " A:Lung ", "Choice B": " B:Heart ", "Choice C": " C:Liver ", "Choice D": " D:Brain "}
_PMC = {"Figure_path": "PMC1_1.jpg", "Question": " Which organ? ", **_CHOICES}
_RAD = {"qid": 0, "image_name": "a.png", "image_organ": "CHEST", "question": "Is it red?", "answer_type": "CLOSED"}
_SLAKE = {
    "img_id": 1,
    "img_name": "a.png",
    "question": "Is it red?",
    "answer": "yes",
    "answer_type": "CLOSED",
    "qid": 0,
}


def _chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def _share(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": side, "value": text} for side, text in turns]


_LONG = [("user", ASKED), ("assistant", "yes"), ("user", "Sure?"), ("assistant", "Yes.")]
_PARTS = [{"type": "image"}, {"type": "text", "text": "Is it red?"}]
# As datasets gives parts back: every part has every field.
_FILLED = [{"index": 0, "text": None, "type": "image"}, {"index": None, "text": "Is it red?", "type": "text"}]

LAYOUTS: dict[str, tuple[str, list[tuple[dict[str, Any], Meant]]]] = {
    "llava": (
        "llava",
        [
            ({"image": "a.png", "conversations": _share(("human", ASKED), ("gpt", "yes"))}, ONE),
            ({"conversations": _share(("human", "What?"), ("gpt", "This."))}, TEXT),
        ],
    ),
    "sharegpt": (
        "sharegpt",
        [
            ({"conversations": _share(("human", "What?"), ("gpt", "This."))}, TEXT),
            ({"images": ["a.png"], "conversations": _share(("human", ASKED), ("gpt", "yes"))}, ONE),
        ],
    ),
    "LLaMA-Factory's sharegpt with system": (
        "sharegpt",
        [
            (
                {
                    "conversations": _share(
                        ("human", ASKED), ("gpt", "yes"), ("human", "Sure?"), ("gpt", "Yes.")
                    ),
                    "system": "Be brief.",
                    "images": ["a.png"],
                },
                SYSTEM,
            )
        ],
    ),
    "LLaMA-Factory's mllm_demo": (
        "messages",
        [({"messages": _chat(*_LONG), "images": ["a.png"], "system": "Be brief."}, SYSTEM)],
    ),
    "OpenAI": (
        "messages",
        [
            ({"messages": _chat(("user", "What?"), ("assistant", "This."))}, TEXT),
            (
                {
                    "messages": _chat(
                        (
                            "user",
                            [
                                {
                                    "type": "image_url",
                                    "image_url": {"url": f"data:image/png;base64,{BASE64}", "detail": "low"},
                                },
                                {"type": "text", "text": "Is it red?"},
                            ],
                        ),
                        ("assistant", [{"type": "text", "text": "yes"}]),
                    )
                },
                (ONE[0], (f"data:image/png;base64,{BASE64}",)),
            ),
        ],
    ),
    "TRL's messages": (
        "messages",
        [
            ({"messages": _chat(("user", _PARTS), ("assistant", "yes")), "images": ["a.png"]}, ONE),
            (
                {"messages": _chat(("user", _FILLED), ("assistant", [{"type": "text", "text": "yes"}])),
                 "images": [{"bytes": None, "path": "a.png"}]},
                ONE,
            ),
            ({"messages": _chat(("user", "Is it red?"), ("assistant", "yes")), "images": ["a.png"]}, ONE),
        ],
    ),
    "TRL's prompt and completion": (
        "prompt_completion",
        [
            ({"prompt": "Is it red?", "completion": "yes", "images": ["a.png"]}, ONE),
            (
                {
                    "prompt": _chat(("system", "Be brief."), *_LONG[:3]),
                    "completion": _chat(("assistant", "Yes.")),
                    "images": ["a.png"],
                },
                SYSTEM,
            ),
            (
                {
                    "prompt": _chat(("user", "Is it red?")),
                    "completion": _chat(("assistant", "yes")),
                    "images": [{"bytes": png(), "path": None}],
                },
                (ONE[0], (png(),)),
            ),
        ],
    ),
    "LLaMA-Factory's alpaca": (
        "alpaca",
        [
            ({"instruction": "What?", "input": "", "output": "This."}, TEXT),
            ({"instruction": "<image>", "input": "Is it red?", "output": "yes", "images": ["a.png"]}, ONE),
            (
                {
                    "instruction": "Sure?",
                    "output": "Yes.",
                    "system": "Be brief.",
                    "history": [[ASKED, "yes"]],
                    "images": ["a.png"],
                },
                SYSTEM,
            ),
        ],
    ),
    "ms-swift's messages": (
        "messages",
        [
            (
                {"messages": [*_chat(("user", "Is it red?")), {"role": "assistant", "content": "yes", "loss": True}],
                 "images": ["a.png"]},
                ONE,
            )
        ],
    ),
    "ms-swift's query and response": (
        "query_response",
        [
            ({"query": "What?", "response": "This.", "images": []}, TEXT),
            (
                {
                    "query": "Sure?",
                    "response": "Yes.",
                    "system": "Be brief.",
                    "history": [["Is it red?", "yes"]],
                    "images": ["a.png"],
                },
                SYSTEM,
            ),
        ],
    ),
    "question and answer": (
        "question_answer",
        [
            (
                {"question": "Is it red?", "answer": "yes", "image": {"bytes": png(), "path": "a.png"}},
                (ONE[0], (png(),)),
            ),
            ({"question": "What?", "answer": "This.", "image": None}, TEXT),
            ({"question": "How many?", "answer": 2}, ([("user", "How many?"), ("assistant", "2")], ())),
            (
                {"question": "Is it red?", "answers": ["no", "yes", "yes"], "image": "a.png"},
                ONE,
            ),
        ],
    ),
    "captions": (
        "caption",
        [
            ({"image": "a.png", "text": "A cat."}, ([("user", "<image>"), ("assistant", "A cat.")], ("a.png",))),
            (
                {"image": png(), "txt": "A cat.", "url": "-"},
                ([("user", "<image>"), ("assistant", "A cat.")], (png(),)),
            ),
            (
                {"image": "b.png", "caption": ["A dog.", "Its tail."]},
                ([("user", "<image>"), ("assistant", "A dog.")], ("b.png",)),
            ),
        ],
    ),
    "UReader": (
        "ureader",
        [
            (
                {
                    "image": ["./DocVQA/x.png"],
                    "prompt": "",
                    "text": "",
                    "system_instruction": "",
                    "conversations": _share(("user", "<image>"), ("user", "Is it red?"), ("assistant", "None")),
                    "task_type": "qa_sft",
                },
                ([("user", ASKED), ("assistant", "None")], ("./DocVQA/x.png",)),
            ),
            (
                {
                    "image": ["a.tif.3", "a.tif.4"],
                    "conversations": _share(("user", "<|image|><|image|>"), ("user", "Which?"), ("assistant", "B")),
                },
                ([("user", "<image><image>\nWhich?"), ("assistant", "B")], ("a.tif.3", "a.tif.4")),
            ),
        ],
    ),
    "M3IT": (
        "m3it",
        [
            ({"instruction": "Is it red?", "inputs": "", "outputs": "yes", "image_base64_str": [BASE64]}, EMBEDDED),
            ({"instruction": "What?", "inputs": "", "outputs": "This.", "img_str": None}, TEXT),
            ({"instruction": "Is it red?", "inputs": None, "outputs": "yes", "img_str": BASE64}, EMBEDDED),
        ],
    ),
    "VQA-RAD": ("vqa_rad", [({**_RAD, "answer": "yes"}, ONE), ({**_RAD, "answer": "yes", "phrase_type": "para"}, ONE)]),
    "SLAKE": ("slake", [({**_SLAKE, "q_lang": "en"}, ONE)]),
    "PathVQA": (
        "path_vqa",
        [({"image": "train_0422", "question": "Is it red?", "answer": "yes"}, (ONE[0], ("train_0422.jpg",)))],
    ),
    "PMC-VQA": (
        "pmc_vqa",
        [
            ({**_PMC, "Caption": "A figure.", "Answer": "B", "split": "train"}, PMC),
            ({**_PMC, "Anwser": " Heart "}, PMC),
            ({**_PMC, "Answer": "Heart", "Answer_label": "B"}, PMC),
        ],
    ),
    "ChartQA": ("chartqa", [({"imgname": "a.png", "query": "Is it red?", "label": "yes"}, ONE)]),
    "ChartQA of the hub": (
        "chartqa",
        [({"image": {"bytes": png(), "path": None}, "query": "Is it red?", "label": ["yes"], "human_or_machine": 0},
          (ONE[0], (png(),)))],
    ),
}  # fmt: skip
"""By who ships them: the layout, and records with what they mean."""
