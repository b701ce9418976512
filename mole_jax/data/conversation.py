"""From a conversation to token ids and the mask of supervised tokens.

A conversation is laid out as segments (text, image, end of answer), each marked as supervised or not.
Neighbouring texts are joined into chunks, a chunk is tokenised as a whole, and a token is supervised
where its first character lies in a supervised segment. No part is ever tokenised twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec
from mole_jax.prompts import IMAGE, PromptPreset
from mole_jax.terminal import shortened
from mole_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side says; `text` may hold `<image>` where the role is user."""

    role: Literal["user", "assistant"]
    text: str


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation: turns alternate, a user's first; one image (path or file content) per `<image>`."""

    id: str
    domain: str
    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example as the model reads it; T counts image tokens too.

    loss_mask[t] is 1 where token t itself is supervised: the answer and the closing EOS of every
    assistant turn.
    """

    tokens: Int[np.ndarray, " T"]
    loss_mask: Int[np.ndarray, " T"]
    images: tuple[str | bytes, ...]


@dataclasses.dataclass(frozen=True)
class _Segment:
    kind: Literal["text", "image", "end"]
    text: str = ""
    supervised: bool = False


def encode(example: Example, tokenizer: Tokenizer, prompt: PromptPreset, image: ImageSpec) -> Encoded:
    """Returns the token ids, supervision and images of `example`.

    A turn's single `<image>` moves to the start of the turn, followed by a newline, as in LLaVA; a turn
    with several images keeps them where they stand. Each becomes `image.span` times `image.token_id`.

    Raises:
      UserError: images and `<image>` do not match, or nothing is supervised. It names the example.
    """
    name = f"example '{example.domain}/{shortened(example.id)}'"
    _check_images(example, name)
    segments = list(_plain(example.turns, name) if prompt.plain else _chat(example.turns, prompt))
    tokens, mask = _tokenise(segments, tokenizer, prompt, image)
    if not mask.any():
        raise UserError(f"{name}: no token is supervised; give it an assistant turn with text, or take it out")
    return Encoded(tokens, mask, example.images)


def encode_prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, prompt: PromptPreset, image: ImageSpec
) -> Int[np.ndarray, " T"]:
    """Returns the token ids after which the model answers `turns`, the last of which is a user's.

    They end with `ASSISTANT:`, under the preset `plain` with the image.

    Raises:
      UserError: the last turn is not a user's, or `plain` without an image.
    """
    if not turns or turns[-1].role != "user":
        raise UserError("prompt: the last turn must be the user's; add a question")
    segments = list(_plain(turns, "prompt") if prompt.plain else _chat(turns, prompt))
    if not prompt.plain:
        segments.append(_Segment("text", f"{prompt.assistant}:"))
    return _tokenise(segments, tokenizer, prompt, image)[0]


def image_count(turns: Sequence[Turn]) -> int:
    """Returns the number of `<image>` in all turns."""
    return sum(turn.text.count(IMAGE) for turn in turns)


def _check_images(example: Example, name: str) -> None:
    marks, images = image_count(example.turns), len(example.images)
    if marks != images:
        raise UserError(
            f"{name}: field image has {images} image(s) but the text has {marks} {IMAGE}; "
            f"write one {IMAGE} in a human turn for each image"
        )
    if any(IMAGE in turn.text for turn in example.turns if turn.role == "assistant"):
        raise UserError(f"{name}: {IMAGE} stands in an assistant turn; move it into a human one")


def _chat(turns: Sequence[Turn], prompt: PromptPreset) -> Iterator[_Segment]:
    if prompt.system:
        yield _Segment("text", prompt.system + " ")
    for turn in turns:
        if turn.role == "user":
            yield _Segment("text", f"{prompt.user}: ")
            yield from _with_images(_place_image(turn.text))
            yield _Segment("text", " ")
        else:
            yield _Segment("text", f"{prompt.assistant}:")
            # The space belongs to the answer: generation starts right after the colon.
            yield _Segment("text", " " + turn.text, supervised=True)
            yield _Segment("end", supervised=True)


def _plain(turns: Sequence[Turn], name: str) -> Iterator[_Segment]:
    if image_count(turns) != 1 or [turn.role for turn in turns] not in (["user"], ["user", "assistant"]):
        raise UserError(
            f"{name}: the prompt preset plain takes one question with one {IMAGE} and its caption; "
            "choose data.prompt v1 for conversations"
        )
    yield _Segment("image")
    for turn in turns[1:]:
        yield _Segment("text", turn.text + "\n", supervised=True)


def _place_image(text: str) -> str:
    if text.count(IMAGE) != 1:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def _with_images(text: str) -> Iterator[_Segment]:
    for index, part in enumerate(text.split(IMAGE)):
        if index:
            yield _Segment("image")
        if part:
            yield _Segment("text", part)


def _tokenise(
    segments: Sequence[_Segment], tokenizer: Tokenizer, prompt: PromptPreset, image: ImageSpec
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    tokens: list[int] = []
    mask: list[int] = []
    chunk: list[_Segment] = []

    def add(ids: Sequence[int], supervised: Sequence[bool]) -> None:
        tokens.extend(ids)
        mask.extend(map(int, supervised))

    def flush() -> None:
        ids, offsets = tokenizer.encode("".join(segment.text for segment in chunk))
        flags = np.repeat([segment.supervised for segment in chunk], [len(segment.text) for segment in chunk])
        # A token without characters at the very end (none known) takes the last character's mark.
        add(ids, [bool(flags[min(start, len(flags) - 1)]) for start, _ in offsets])
        chunk.clear()

    if prompt.bos and tokenizer.bos_id is not None:
        add([tokenizer.bos_id], [False])
    for segment in segments:
        if segment.kind == "text":
            chunk.append(segment)
            continue
        flush()
        if segment.kind == "image":
            add([image.token_id] * image.span, [False] * image.span)
        else:
            add([tokenizer.eos_id], [segment.supervised])
    flush()
    return np.asarray(tokens, np.int32), np.asarray(mask, np.int32)
