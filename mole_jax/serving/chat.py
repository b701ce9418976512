"""A conversation in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from mole_jax.data.conversation import Turn
from mole_jax.errors import UserError
from mole_jax.prompts import PromptPreset
from mole_jax.serving.assistant import Assistant
from mole_jax.terminal import escaped

HELP = "/new forgets what was said, /image FILE shows another image, /quit (or end of input) leaves"


def chat(assistant: Assistant, images: Sequence[str], lines: Iterable[str], write: Callable[[str], object]) -> None:
    """Answers line after line, each with all that was said before; the images stay in sight.

    A line that cannot be answered is told in one line and taken back; the conversation goes on.

    Raises:
        UserError: the prompt preset is for captions only, or an image cannot be read.
    """
    preset = assistant.processor.layout.prompt
    if isinstance(preset, PromptPreset) and preset.plain:
        raise UserError(f"the prompt preset {preset.name} is for captions and has no turns; choose --prompt v1")
    if images:
        assistant.prompt("?", images)
    turns: list[Turn] = []
    user, speaker = (preset.user, preset.assistant) if isinstance(preset, PromptPreset) else ("USER", "ASSISTANT")
    write(f"{HELP}\n{user}: ")
    for line in map(str.strip, _until_interrupt(lines)):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        try:
            if command == "/new":
                turns = []
            elif command == "/image":
                assistant.prompt("?", [rest.strip()])
                turns, images = [], [rest.strip()]
            elif line.startswith("/"):
                write(f"{HELP}\n")
            elif line:
                asked = [*turns, Turn("user", line)]
                turns = [*asked, Turn("assistant", _answer(assistant, asked, images, speaker, write))]
        except UserError as error:
            write(f"error: {escaped(str(error))}\n")
        write(f"{user}: ")
    write("\n")


def _until_interrupt(lines: Iterable[str]) -> Iterator[str]:
    with contextlib.suppress(KeyboardInterrupt):
        yield from lines


def _answer(
    assistant: Assistant, turns: Sequence[Turn], images: Sequence[str], speaker: str, write: Callable[[str], object]
) -> str:
    prompt = assistant.prompt(turns, images)
    write(f"{speaker}: ")
    pieces = []
    for piece in assistant.stream(prompt):
        pieces.append(piece)
        write(piece)
    write("\n")
    return "".join(pieces)
