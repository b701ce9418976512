"""The text of an answer while its tokens come in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mole_jax.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of bytes that are no character (yet)."""


@dataclasses.dataclass
class Answer:
    """The tokens and the text of one answer; `push` adds to them.

    White space around the text is left out, and so is what follows a stop text. The pieces that `push` returns
    join to `text`, and no piece ends within a character: of what is not certain yet, it returns nothing.
    """

    tokenizer: Tokenizer | None = None
    """None: tokens only, the text stays empty."""
    stop: Sequence[str] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finished: bool = False

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Adds tokens and returns the text that has become certain; `last`: no more will follow."""
        if self.finished:
            return ""
        self.tokens += tokens
        self.finished = last
        if self.tokenizer is None:
            return ""
        text = _whole_characters(self.tokenizer, self.tokens).lstrip()
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.finished = True
            text = text[: min(found)]
        elif not last:
            text = text[: len(text) - max((_begun(text, stop) for stop in self.stop), default=0)]
        text = text.rstrip()
        if not text.startswith(self.text):  # bytes that are no character made the tokenizer take something back
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece


def _whole_characters(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Returns the text without a last character of which some of the bytes (at most 3 of 4) are there."""
    for missing in range(min(4, len(tokens) + 1)):
        text = tokenizer.decode(tokens[: len(tokens) - missing])
        if not text.endswith(REPLACEMENT):
            return text
    return tokenizer.decode(tokens)


def _begun(text: str, stop: str) -> int:
    """Returns how many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
