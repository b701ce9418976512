"""From a conversation to token ids and the mask of supervised tokens.

By a preset, a conversation is laid out as segments (text, image, end of answer), each marked as supervised or not.
Neighbouring texts are joined into chunks, a chunk is tokenised as a whole, and a token is supervised
where its first character lies in a supervised segment. No part is ever tokenised twice. By the checkpoint's own
template, `mole_jax.data.template` does it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from mole_jax.data.template import Template
from mole_jax.data.tiling import single
from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec, PictureLayout, Single
from mole_jax.prompts import IMAGE, PromptPreset
from mole_jax.terminal import shortened
from mole_jax.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side says; `text` may hold `<image>` where the role is not assistant."""

    role: Role
    text: str
    supervised: bool = True
    """Of an assistant's turn: it is trained on. Off: it is context for later turns."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation: turns alternate, a user's first, perhaps a system turn before; one image (path or file content)
    per `<image>`."""

    id: str
    domain: str
    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example as the model reads it; T counts image tokens too.

    loss_mask[t] is 1 where token t itself is supervised: the answer and the closing EOS of every
    assistant turn that is.
    """

    tokens: Int[np.ndarray, " T"]
    loss_mask: Int[np.ndarray, " T"]
    images: tuple[str | bytes, ...]
    layouts: tuple[PictureLayout, ...]
    """Where the features of each image go."""


@dataclasses.dataclass(frozen=True)
class _Segment:
    kind: Literal["text", "image", "end"]
    text: str = ""
    supervised: bool = False


def encode(
    example: Example,
    tokenizer: Tokenizer,
    prompt: PromptPreset | Template,
    image: ImageSpec,
    layouts: Sequence[PictureLayout] | None = None,
) -> Encoded:
    """Returns the token ids, supervision and images of `example`.

    A turn's single `<image>` moves to the start of the turn, followed by a newline, as in LLaVA; a turn
    with several images keeps them where they stand. Each becomes `image.token_id`, as often as its layout has
    positions.

    Args:
      example: a conversation.
      tokenizer: of the model; a template has its own.
      prompt: preset or the checkpoint's template.
      image: how the model takes images.
      layouts: of the images; None: of models for which an image is one tile, whatever its size.

    Raises:
      UserError: images and `<image>` do not match, the prompt does not take these turns, or nothing is supervised. It
        names the example.
    """
    name = f"example '{example.domain}/{shortened(example.id)}'"
    _check_images(example, name)
    if layouts is None:
        layouts = _single(image, len(example.images))
    if isinstance(prompt, PromptPreset):
        segments = list(_segments(example.turns, prompt, name))
        tokens, mask = _tokenise(segments, tokenizer, prompt, image, layouts)
    else:
        try:
            said = [(turn.role, turn.text) for turn in example.turns]
            tokens, mask = prompt.encode(said, layouts, [one.supervised for one in example.turns])
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    if not mask.any():
        raise UserError(f"{name}: no token is supervised; give it an assistant turn with text, or take it out")
    return Encoded(tokens, mask, example.images, tuple(layouts))


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    prompt: PromptPreset | Template,
    image: ImageSpec,
    layouts: Sequence[PictureLayout] | None = None,
) -> Int[np.ndarray, " T"]:
    """Returns the token ids after which the model answers `turns`, the last of which is a user's.

    They end where the answer begins: with `ASSISTANT:`, under the preset `plain` with the image.

    Raises:
      UserError: the last turn is not a user's, the prompt does not take these turns, or there is not one `<image>` for
        each of `layouts` (where they are given).
    """
    if not turns or turns[-1].role != "user":
        raise UserError("prompt: the last turn must be the user's; add a question")
    count = image_count(turns)
    if layouts is None:
        layouts = _single(image, count)
    if count != len(layouts):
        raise UserError(f"the question has {count} {IMAGE}, {len(layouts)} images were given; make them equal")
    if not isinstance(prompt, PromptPreset):
        return prompt.encode_prompt([(turn.role, turn.text) for turn in turns], layouts)
    segments = list(_segments(turns, prompt, "prompt"))
    if not prompt.plain:
        segments.append(_Segment("text", f"{prompt.assistant}:"))
    return _tokenise(segments, tokenizer, prompt, image, layouts)[0]


def image_count(turns: Sequence[Turn]) -> int:
    """Returns the number of `<image>` in all turns."""
    return sum(turn.text.count(IMAGE) for turn in turns)


def _single(image: ImageSpec, count: int) -> tuple[PictureLayout, ...]:
    assert isinstance(image.tiling, Single), "layouts of cut images depend on their sizes"
    return (single.layout(image, IMAGE),) * count


def _check_images(example: Example, name: str) -> None:
    marks, images = image_count(example.turns), len(example.images)
    if marks != images:
        raise UserError(
            f"{name}: field image has {images} image(s) but the text has {marks} {IMAGE}; "
            f"write one {IMAGE} in a human turn for each image"
        )
    if any(IMAGE in turn.text for turn in example.turns if turn.role == "assistant"):
        raise UserError(f"{name}: {IMAGE} stands in an assistant turn; move it into a human one")


def _segments(turns: Sequence[Turn], prompt: PromptPreset, name: str) -> Iterator[_Segment]:
    if any(turn.role == "system" for turn in turns):
        raise UserError(
            f"{name}: the prompt preset {prompt.name} has no place for a system turn; take it out, or set data.prompt "
            "checkpoint for a base whose chat template has one"
        )
    return _plain(turns, name) if prompt.plain else _chat(turns, prompt)


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
            yield _Segment("text", " " + turn.text, supervised=turn.supervised)
            yield _Segment("end", supervised=turn.supervised)


def _plain(turns: Sequence[Turn], name: str) -> Iterator[_Segment]:
    if image_count(turns) != 1 or [turn.role for turn in turns] not in (["user"], ["user", "assistant"]):
        raise UserError(
            f"{name}: the prompt preset plain takes one question with one {IMAGE} and its caption; "
            "choose data.prompt v1 for conversations"
        )
    yield _Segment("image")
    for turn in turns[1:]:
        yield _Segment("text", turn.text + "\n", supervised=turn.supervised)


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
    segments: Sequence[_Segment],
    tokenizer: Tokenizer,
    prompt: PromptPreset,
    image: ImageSpec,
    layouts: Sequence[PictureLayout],
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    tokens: list[int] = []
    mask: list[int] = []
    chunk: list[_Segment] = []
    pictures = iter(layouts)

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
            positions = sum(next(pictures).runs)
            add([image.token_id] * positions, [False] * positions)
        else:
            add([tokenizer.eos_id], [segment.supervised])
    flush()
    return np.asarray(tokens, np.int32), np.asarray(mask, np.int32)
