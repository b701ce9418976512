"""Text from users' files on its way to a terminal: it may not move the cursor, hide text or forge a line of ours."""

from __future__ import annotations

import os
import re
from typing import TextIO

# Control characters, lone surrogates (no encoding has them), line separators and the marks that reverse the direction
# of writing, by which a text can look like another one. Joiners stay: emoji and some scripts need them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_YELLOW, _PLAIN = "\x1b[33m", "\x1b[0m"
MOST_SHOWN = 120
"""Characters of a value that a message shows."""


def escaped(text: str, *, keep: str = "") -> str:
    """Returns `text` with control characters written out (``\\n``, ``\\x1b``, ``\\u202e``), except those in `keep`."""

    def written_out(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return _UNSAFE.sub(written_out, text)


def block(text: str) -> str:
    """Returns `text` of several lines, escaped, its lines after the first indented: none can pass for one of ours."""
    return escaped(text, keep="\n\t").replace("\n", "\n    ")


def shortened(text: str, most: int = MOST_SHOWN) -> str:
    """Returns `text`, cut after `most` characters with a word on how many it has."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def warning(text: str, stream: TextIO) -> str:
    """Returns `text` in yellow where `stream` is a terminal and ``NO_COLOR`` is not set, else as it is."""
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return text
    return f"{_YELLOW}{text}{_PLAIN}"
