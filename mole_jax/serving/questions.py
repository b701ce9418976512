"""A file of questions to a file of answers, both JSONL as LLaVA's; what was answered is not asked again."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mole_jax import config_json
from mole_jax.data.containers.json_file import decode
from mole_jax.data.layouts.layout import check_text
from mole_jax.errors import UserError, nearest
from mole_jax.files import explained, made
from mole_jax.serving.assistant import Assistant
from mole_jax.serving.sampler import Prompt
from mole_jax.terminal import shortened
from mole_jax.weights.foreign import of_pixels

FIELDS = {"question_id": ("question_id", "id"), "text": ("text", "question"), "image": ("image",)}
"""Fields of a question, each with the names that it may have. `image` is a path, a list of paths or not there."""


@dataclasses.dataclass(frozen=True)
class QuestionLine:
    """One line of a file of questions."""

    id: str | int | float
    text: str
    images: tuple[str, ...]
    number: int
    """Its place among the lines, from 0; its random draws depend on it, so they are the same after a stop."""


@dataclasses.dataclass
class Outcome:
    """How many questions were answered now and before, and what was wrong with the others."""

    answered: int = 0
    before: int = 0
    skipped: list[str] = dataclasses.field(default_factory=list)


def answer_file(
    assistant: Assistant,
    questions: Path,
    output: Path,
    *,
    model_id: str,
    image_root: Path | None = None,
    on_bad: Literal["error", "skip"] = "error",
) -> Outcome:
    """Answers the questions that `output` has no answer to yet and adds a line for each, batch by batch.

    An answer has ``question_id``, ``prompt`` (the question), ``text``, ``model_id`` and ``metadata``: the prompt
    preset, the image preparation and the decoding.

    Args:
        assistant: answers; its sampler's batch size is the number of questions at a time.
        questions: file with an object a line, of `FIELDS`.
        output: file to add to.
        model_id: name of the checkpoint, for the answers.
        image_root: folder that images are relative to. None: that of `questions`.
        on_bad: stop at a question that cannot be asked, or leave it out and report it.

    Raises:
        UserError: a file cannot be read or written, `output` holds answers made otherwise or belongs to another
            process, or a question is bad. What was answered until then is in `output`.
    """
    processor, outcome = assistant.processor, Outcome()
    decoding = config_json.to_json(assistant.sampler.decoding)
    how = {"prompt": processor.prompt, "image_aspect": processor.image_aspect, "decoding": decoding}
    how |= of_pixels(processor.arch)
    common = {"model_id": model_id, "metadata": how}
    root = questions.parent if image_root is None else image_root

    def prompts() -> Iterator[tuple[QuestionLine, Prompt]]:
        if _text(questions).lstrip().startswith("["):
            raise UserError(f"{questions}: is a JSON list; write the questions in it one a line")
        for where, line in _lines(questions):
            try:
                question = _question(line, where)
                if json.dumps(question.id) in seen:
                    raise UserError(
                        f"question_id {shortened(repr(question.id))} stands on an earlier line too; make them different"
                    )
                seen.add(json.dumps(question.id))
                if json.dumps(question.id) in before:
                    outcome.before += 1
                    continue
                prompt = assistant.prompt(question.text, question.images, root)
            except UserError as error:
                message = f"{questions}: line {where + 1}: {error}"
                if on_bad == "error":
                    raise UserError(f"{message} (or leave such lines out with --on-bad skip)") from None
                outcome.skipped.append(message)
                continue
            yield question, dataclasses.replace(prompt, number=question.number)

    seen: set[str] = set()
    with _held(output):
        before = _answered(output, common)
        for batch in itertools.batched(prompts(), assistant.sampler.batch_size):
            lines = []
            for (question, _), text in zip(batch, assistant.answers([prompt for _, prompt in batch]), strict=True):
                answer = {"question_id": question.id, "prompt": question.text, "text": text, **common}
                lines.append(json.dumps(answer, ensure_ascii=False) + "\n")
            with explained(output), output.open("a", encoding="utf-8") as file:
                file.writelines(lines)
            outcome.answered += len(batch)
    return outcome


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """Makes the file and keeps it from a second process, which would answer the same questions."""
    with explained(output):
        if output.exists() and not output.is_file():
            raise UserError(f"{output}: is no file; choose another --output")
        made(output.parent)
        descriptor = os.open(output, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, output)
        yield
    finally:
        os.close(descriptor)  # and with it goes the lock


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{output}: another process writes its answers there; wait for it or choose another --output"
        ) from None
    except OSError as error:
        raise UserError(
            f"{output}: its file system cannot lock files ({error.strerror}); choose another --output"
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (place from 0, line) of the lines that are not blank."""
    for place, line in enumerate(_text(path).split("\n")):
        if line.strip():
            yield place, line


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows tools write a byte-order mark
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _question(line: str, number: int) -> QuestionLine:
    try:
        raw = decode(line)
    except ValueError as error:
        raise UserError(f"not JSON ({error}); write one object a line") from None
    if not isinstance(raw, Mapping):
        raise UserError("expected an object with question_id, text and image")
    identity, text, image = (_field(raw, name) for name in FIELDS)
    if isinstance(identity, bool) or not isinstance(identity, str | int | float) or identity != identity:
        raise UserError(f"field question_id: expected text or a number, got {shortened(repr(identity))}")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"field text: expected a question, got {shortened(repr(text))}")
    images = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(one, str) and one for one in images):
        raise UserError(f"field image: expected a path or a list of paths, got {shortened(repr(image))}")
    for name, found in (("question_id", str(identity)), ("text", text), *(("image", one) for one in images)):
        check_text(found, name, lambda field, problem: UserError(f"field {field}: {problem}"))
    return QuestionLine(identity, text, tuple(images), number)


def _field(raw: Mapping[str, Any], name: str) -> Any:
    for known in FIELDS[name]:
        if known in raw:
            return raw[known]
    if name == "image":
        return None
    unknown = [one for one in map(str, raw) if not any(one in names for names in FIELDS.values())]
    found = [one for one in unknown if nearest(one, FIELDS[name], cutoff=0.8)]
    remedy = f"rename '{shortened(found[0])}' to {name}" if found else "add it"
    raise UserError(f"field {name} is missing; {remedy}")


def _answered(output: Path, common: Mapping[str, Any]) -> set[str]:
    """Returns the ids in `output` as JSON, after taking off a last line that was not finished.

    Raises:
        UserError: an answer there was made by another model or in another way.
    """
    if not output.exists():
        return set()
    with explained(output):
        # Shortened where it stands: a kill leaves the lines, and the lock is on this very file.
        content = output.read_bytes()
        if (end := content.rfind(b"\n") + 1) != len(content):
            os.truncate(output, end)
    ids = set()
    for place, line in _lines(output):
        try:
            answer = json.loads(line)
            made = {name: answer[name] for name in common}
            ids.add(json.dumps(answer["question_id"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{output}: line {place + 1} is no answer of ours; choose another --output") from None
        for name, value in common.items():
            if made[name] != value:
                raise UserError(
                    f"{output}: line {place + 1} was made with {name} {json.dumps(made[name])}, not "
                    f"{json.dumps(value)}; choose another --output"
                )
    return ids
