"""Tokens and labels against LLaVA's own, and the rules around images and turns."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_jax.data.conversation import Example, Turn, encode, encode_prompt
from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec
from mole_jax.prompts import PROMPTS, VICUNA_SYSTEM

ROLES = {"human": "user", "gpt": "assistant"}
IMAGE = ImageSpec(size=8, side=1, token_id=-200)


def _turns(conversations: list[dict]) -> tuple[Turn, ...]:
    return tuple(Turn(ROLES[turn["from"]], turn["value"]) for turn in conversations)


def _example(*texts: str, images: int = 0) -> Example:
    turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    return Example("e", "d", turns, ("x.png",) * images)


def _runs(encoded) -> list[np.ndarray]:
    """Returns the tokens of each maximal supervised run."""
    edges = np.flatnonzero(np.diff(encoded.loss_mask, prepend=0, append=0)).reshape(-1, 2)
    return [encoded.tokens[start:end] for start, end in edges]


def test_v1_is_what_llava_trains_on(reference, llama_tokenizer):
    golden = json.loads(reference("llava_v1/cases.json").read_text(encoding="utf-8"))
    for case in golden["cases"]:
        example = Example(case["name"], "d", _turns(case["conversations"]), ("x",) * case["has_image"])
        image = dataclasses.replace(IMAGE, token_id=golden["image_token_index"])
        encoded = encode(example, llama_tokenizer, PROMPTS["v1"], image)
        labels = np.where(encoded.loss_mask == 1, encoded.tokens, golden["ignore_index"])
        assert encoded.tokens.tolist() == case["input_ids"], case["name"]
        assert labels.tolist() == case["labels"], case["name"]


def test_supervised_runs_decode_to_the_answers(reference, llama_tokenizer):
    golden = json.loads(reference("metrics/vila_label_mask.json").read_text(encoding="utf-8"))
    for conversations in golden["conversations"]:
        images = sum(turn["value"].count("<image>") for turn in conversations)
        example = Example("e", "d", _turns(conversations), ("x",) * images)
        runs = _runs(encode(example, llama_tokenizer, PROMPTS["v1"], IMAGE))
        assert all(run[-1] == llama_tokenizer.eos_id for run in runs)
        answers = [turn["value"] for turn in conversations if turn["from"] == "gpt"]
        assert [llama_tokenizer.decode(run[:-1]).lstrip() for run in runs] == answers


def test_llava_mole_is_v1_without_bos(tokenizer):
    example = _example("<image>\nWhat is it?", "A dog.", images=1)
    v1 = encode(example, tokenizer, PROMPTS["v1"], IMAGE)
    mole = encode(example, tokenizer, PROMPTS["llava_mole"], IMAGE)
    assert v1.tokens[0] == tokenizer.bos_id
    np.testing.assert_array_equal(v1.tokens[1:], mole.tokens)
    np.testing.assert_array_equal(v1.loss_mask[1:], mole.loss_mask)


def test_plain_is_image_caption_newline(tokenizer):
    encoded = encode(_example("Describe this.\n<image>", "A dog.", images=1), tokenizer, PROMPTS["plain"], IMAGE)
    caption = tokenizer.encode("A dog.\n")[0]
    assert encoded.tokens.tolist() == [tokenizer.bos_id, -200, *caption]
    assert encoded.loss_mask.tolist() == [0, 0] + [1] * len(caption)


def test_an_image_moves_to_the_start_of_its_turn_and_takes_its_span(tokenizer):
    first = encode(_example("<image>\nWhat is it?", "A dog.", images=1), tokenizer, PROMPTS["v1"], IMAGE)
    for text in ("What is it?\n<image>", "What <image>is it?", "  <image>What is it?  "):
        moved = encode(_example(text, "A dog.", images=1), tokenizer, PROMPTS["v1"], IMAGE)
        np.testing.assert_array_equal(moved.tokens, first.tokens)
    wide = encode(
        _example("<image>\nWhat is it?", "A dog.", images=1),
        tokenizer,
        PROMPTS["v1"],
        dataclasses.replace(IMAGE, side=2, first=1),
    )
    assert len(wide.tokens) == len(first.tokens) + 4
    assert (wide.tokens == -200).sum() == 5
    assert not wide.loss_mask[wide.tokens == -200].any()


def test_several_images_of_a_turn_stay_where_they_stand(tokenizer):
    encoded = encode(_example("one <image> two <image>", "Same.", images=2), tokenizer, PROMPTS["v1"], IMAGE)
    chunks = [f"{VICUNA_SYSTEM} USER: one ", " two ", " ASSISTANT: Same."]
    first, second, third = (tokenizer.encode(chunk)[0] for chunk in chunks)
    assert encoded.tokens.tolist() == [tokenizer.bos_id, *first, -200, *second, -200, *third, tokenizer.eos_id]


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(max_size=12).filter(str.strip), min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0),
    image=st.booleans(),
    prompt=st.sampled_from(["v1", "llava_mole"]),
)
def test_any_conversation_supervises_its_answers_and_nothing_else(texts, image, prompt, tokenizer):
    texts = [text.replace("<image>", "") or "x" for text in texts]
    asked = ["<image>" + texts[0], *texts[1:]] if image else texts
    encoded = encode(_example(*asked, images=int(image)), tokenizer, PROMPTS[prompt], IMAGE)
    runs = _runs(encoded)
    assert [run[-1] for run in runs] == [tokenizer.eos_id] * (len(texts) // 2)
    # sentencepiece's own mark of a space decodes to a space.
    answers = [" " + text.replace("▁", " ") for text in texts[1::2]]
    assert [tokenizer.decode([*tokenizer.encode(":")[0], *run[:-1]]) for run in runs] == [
        ":" + answer for answer in answers
    ]
    assert (encoded.tokens == -200).sum() == image


@pytest.mark.parametrize("prompt", ["v1", "no_system"])
def test_an_answer_that_is_context_alone_is_read_and_not_trained_on(tokenizer, prompt):
    """ms-swift's `loss` and OpenAI's `weight`: the tokens stay, the first answer and its end are not supervised."""
    whole = _example("What?", "A red circle.", "And there?", "A cube.")
    first, *rest = whole.turns[1:]
    context = dataclasses.replace(whole, turns=(whole.turns[0], dataclasses.replace(first, supervised=False), *rest))
    all_, later = (encode(one, tokenizer, PROMPTS[prompt], IMAGE) for one in (whole, context))
    np.testing.assert_array_equal(later.tokens, all_.tokens)
    taught, left = _runs(all_)
    (only,) = _runs(later)
    np.testing.assert_array_equal(only, left)
    assert len(taught)


def test_the_prompt_of_a_question_is_the_beginning_of_its_training_row(tokenizer):
    texts = ("<image>\nWhat is it?", "A dog.", "And now?", "Still a dog.")
    whole = encode(_example(*texts, images=1), tokenizer, PROMPTS["v1"], IMAGE)
    prompt = encode_prompt(_example(*texts[:3]).turns, tokenizer, PROMPTS["v1"], IMAGE)
    answer = _runs(whole)[-1]
    assert prompt.tolist() == whole.tokens[: len(whole.tokens) - len(answer)].tolist()
    assert tokenizer.decode(prompt).endswith("ASSISTANT:")


def test_the_prompt_of_plain_ends_with_the_image(tokenizer):
    prompt = encode_prompt((Turn("user", "Describe.\n<image>"),), tokenizer, PROMPTS["plain"], IMAGE)
    assert prompt.tolist() == [tokenizer.bos_id, -200]


@pytest.mark.parametrize(
    ("example", "prompt", "message"),
    [
        (_example("What?", "A dog.", images=1), "v1", r"'d/e'.*1 image\(s\).*0 <image>.*write one <image>"),
        (_example("<image>What?", "A dog."), "v1", r"'d/e'.*0 image\(s\).*1 <image>"),
        (_example("What?", "A <image> dog.", images=1), "v1", "'d/e': <image> stands in an assistant turn"),
        (_example("What?"), "v1", "'d/e': no token is supervised"),
        (_example("What?", "A dog."), "plain", "'d/e': the prompt preset plain takes one question"),
        (_example("<image>", "A", "B", "C", images=1), "plain", "'d/e': the prompt preset plain takes one question"),
    ],
)
def test_an_unusable_example_is_refused(tokenizer, example, prompt, message):
    with pytest.raises(UserError, match=message):
        encode(example, tokenizer, PROMPTS[prompt], IMAGE)


def test_a_prompt_ends_with_a_question(tokenizer):
    with pytest.raises(UserError, match="last turn must be the user's"):
        encode_prompt(_example("What?", "A dog.").turns, tokenizer, PROMPTS["v1"], IMAGE)
