"""The checkpoint's own text: its chat template and its tokenizer, through transformers, and which tokens are answers.

transformers is imported when a template is loaded and not before: a run with a preset of ours needs none of it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int

from mole_jax.data.prompt import template_text
from mole_jax.errors import UserError
from mole_jax.files import is_remote
from mole_jax.image_spec import PictureLayout
from mole_jax.prompts import IMAGE, PromptPreset
from mole_jax.terminal import shortened
from mole_jax.tokenizer import Tokenizer

Said = tuple[str, str]
"""Role and text of a turn."""
_PROBE = (("user", "Which colour?"), ("assistant", "Blue."), ("user", "And then?"), ("assistant", "Red."))
_GENERATION = re.compile(r"{%-?\s*generation\b")
_CLOCK = "strftime_now"
"""What transformers gives to templates for today's date."""


class _Answer(NamedTuple):
    """Where an assistant's turn stands in a rendering, in characters."""

    lead: int
    """Where the white space before it begins that is written otherwise than asked; `start`: there is none."""
    asked: str
    """That white space as it is asked."""
    start: int
    said: int
    """Where its words end."""
    ended: int | None
    """Where the token that ends it ends; None: the template writes none."""
    stop: int
    """Where the turn ends."""


class Template:
    """A checkpoint's chat template with its tokenizer. Instances can be pickled and used by threads.

    Attributes:
        name: what `data.prompt` calls it.
        ending_ids: tokens that end an answer: the tokenizer's end of sequence, and what the template writes after one.
        remark: what a user should know of the template; None: nothing.
    """

    name = "checkpoint"

    def __init__(self, folder: str, text: str, tokenizer: Any, image_id: int):
        """Use `Template.load`."""
        self._folder, self._text, self._tokenizer, self._image_id = folder, text, tokenizer, image_id
        self._marked = _GENERATION.search(text) is not None
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        self._image_text = str(tokenizer.convert_ids_to_tokens(image_id))
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        special |= {tokenizer.eos_token} - {None}
        self._special = _one_of(special)
        self._reserved = _one_of({*special, self._image_text, IMAGE})
        self._in_parts, self._adds_end, self._leads_otherwise = True, False, False
        self.ending_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, tokenizer: Tokenizer, image_id: int) -> Template:
        """Loads what stands beside a tokenizer's file, and tries the template on a conversation.

        Args:
            tokenizer: of the checkpoint; its folder has the chat template.
            image_id: token in whose place a picture stands.

        Raises:
            UserError: there is no template, it cannot be used for training (it writes the date, or changes earlier
                turns as later ones come), or transformers cannot read the tokenizer.
        """
        folder = tokenizer.source_files[0].parent
        if (text := template_text(folder)) is None:
            raise UserError(
                f"config: data.prompt checkpoint needs a chat template, {folder} has none; put chat_template.jinja "
                "there, or name a preset in data.prompt"
            )
        template = cls(str(folder), text, _transformers_tokenizer(tokenizer, folder), image_id)
        template._try()
        return template

    @property
    def image_text(self) -> str:
        """Text of the token in whose place a picture stands."""
        return self._image_text

    def encode(
        self, turns: Sequence[Said], layouts: Sequence[PictureLayout], supervised: Sequence[bool] | None = None
    ) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        """Returns tokens of a conversation, and 1 for those of answers and the token that ends each.

        Args:
            turns: role (system, user or assistant) and text; ``<image>`` in it stands for a picture.
            layouts: of the pictures, in order.
            supervised: of each turn whether it is, if it is an answer. None: all.

        Raises:
            UserError: the template does not take these turns, or leaves out or changes something of them.
        """
        text, answers = self._written(turns)
        text, moved = self._with_layouts(text, layouts)
        ids, starts, stops = self._tokens(text)
        taught = np.zeros(len(ids), bool)
        of_answers = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
        for place, (start, ended) in zip(of_answers, answers, strict=True):
            if supervised is None or supervised[place]:
                # A token that a space of the prompt and the answer's first letters share is taught.
                taught |= (stops > moved(start)) & (starts < moved(ended))
        return self._expanded(ids, taught, layouts)

    def encode_prompt(self, turns: Sequence[Said], layouts: Sequence[PictureLayout]) -> Int[np.ndarray, " T"]:
        """Returns the tokens after which the model answers `turns`, the last of which is a user's.

        Raises:
            UserError: as `encode`.
        """
        text, _ = self._written(turns, generation=True)
        text, _ = self._with_layouts(text, layouts)
        ids = self._tokens(text)[0]
        return self._expanded(ids, np.zeros(len(ids), bool), layouts)[0]

    @property
    def remark(self) -> str | None:
        found = []
        if self._adds_end:
            found.append(
                f"writes no token where an answer ends, so {self._tokenizer.eos_token} takes the place of what it "
                "writes after one"
            )
        if self._leads_otherwise:
            found.append("has other white space before an answer than where it asks for one; that of asking is taken")
        return f"the chat template of {self._folder} {', and '.join(found)}" if found else None

    def _written(self, turns: Sequence[Said], *, generation: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of a conversation, and where each answer starts and its end has ended.

        Each answer stands as it is asked for and is ended by a token, also where the template does otherwise.
        """
        messages = self._messages(turns)
        text, marked = self._render(messages, generation, marks=self._marked)
        self._check_complete(turns, text)
        whole, done, found = "", 0, []
        for answer in self._answers(turns, messages, text, marked):
            whole += text[done : answer.lead] + answer.asked
            start = len(whole)
            if self._adds_end:
                whole, done = whole + text[answer.start : answer.said] + self._tokenizer.eos_token, answer.stop
            elif answer.ended is None:
                raise self._refused(f"ends no answer with a token ('{shortened(text[answer.start : answer.stop])}')")
            else:
                whole, done = whole + text[answer.start : answer.ended], answer.ended
            found.append((start, len(whole)))
        return whole + text[done:], found

    def _messages(self, turns: Sequence[Said]) -> list[dict[str, Any]]:
        return [{"role": role, "content": self._content(role, text)} for role, text in turns]

    def _content(self, role: str, text: str) -> list[dict[str, str]] | str:
        """Returns the parts of a message; a single picture goes first, as in LLaVA."""
        parts = [] if role == "assistant" else text.split(IMAGE)
        if len(parts) < 2:
            parts, pictures = [text], 0
        elif len(parts) == 2:
            parts, pictures = ["", "".join(parts).strip()], 1
        else:
            # A line's end between a mark and words is the template's to write.
            first, *inner, last = parts
            parts = [first.removesuffix("\n"), *(one.removeprefix("\n").removesuffix("\n") for one in inner)]
            parts, pictures = [*parts, last.removeprefix("\n")], len(inner) + 1
        for reserved in filter(None, map(self._reserved.search, parts)):
            raise UserError(
                f"the words of the {role} have '{reserved[0]}', which is a token of the prompt; take it out or write "
                "it otherwise"
            )
        if not self._in_parts:
            return (self._image_text + "\n").join(parts)
        found: list[dict[str, str]] = []
        for i, words in enumerate(parts):
            found += [{"type": "image"}] if 0 < i <= pictures else []
            found += [{"type": "text", "text": words}] if words else []
        return found

    def _rendered(self, messages: Sequence[dict[str, Any]], *, generation: bool = False) -> str:
        return self._render(messages, generation, marks=False)[0]

    def _render(
        self, messages: Sequence[dict[str, Any]], generation: bool, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of a conversation and, with `marks`, where ``{% generation %}`` stands in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self._text,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=marks,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template may fail in any way, and raises exceptions of its own
            raise self._refused(f"fails ({_first_line(error)})") from None
        return texts[0], [(int(start), int(stop)) for start, stop in spans[0]] if marks else []

    def _check_complete(self, turns: Sequence[Said], text: str) -> None:
        """Raises `UserError` for the first words that the template did not write."""
        place = 0
        for number, (role, said) in enumerate(turns, start=1):
            for words in filter(None, (one.strip() for one in said.split(IMAGE))):
                found = text.find(words, place)
                if found < 0:
                    raise self._refused(f"leaves out or changes words of turn {number} ({role})")
                place = found + len(words)

    def _answers(
        self, turns: Sequence[Said], messages: Sequence[dict[str, Any]], text: str, marked: Sequence[tuple[int, int]]
    ) -> Iterator[_Answer]:
        answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
        if self._marked and len(marked) != len(answers):
            raise self._refused(f"marks {len(marked)} answers of {len(answers)} as generated")
        for number, i in enumerate(answers):
            before = self._rendered(messages[:i], generation=True)
            if self._marked:
                start, stop = marked[number]
            else:
                start, stop = len(before), len(after := self._rendered(messages[: i + 1]))
                if not (text.startswith(after) and text.startswith(before.rstrip())):
                    raise self._refused("writes earlier turns otherwise when later ones follow")
            words = turns[i][1].strip()
            if (place := text.find(words, start - (len(before) - len(before.rstrip())), stop)) < 0:
                raise self._refused("leaves out or changes words of an answer")
            lead, asked, start = self._lead(text, before, start, place)
            said = place + len(words)
            end = self._special.search(text, said)
            ended = end.end() if end is not None and end.start() <= self._room(text, stop) else None
            yield _Answer(lead, asked, start, said, ended, stop)

    def _lead(self, text: str, before: str, start: int, place: int) -> tuple[int, str, int]:
        """Returns `lead`, `asked` and `start` of the answer whose words stand at `place`, asked for by `before`."""
        if text.startswith(before):
            # Who is asked up to there answers with the space.
            start = len(before) if text[len(before) : start].isspace() else start
            return start, "", start
        if text[:place].rstrip() == before.rstrip():
            return len(before.rstrip()), before[len(before.rstrip()) :], place
        if self._marked:
            return start, "", start
        raise self._refused("writes other words before an answer than where it asks for one")

    def _room(self, text: str, stop: int) -> int:
        """Returns the last place where the token that ends an answer may begin; it may stand right behind a mark."""
        return stop + len(text[stop:]) - len(text[stop:].lstrip()) if self._marked else stop - 1

    def _with_layouts(self, text: str, layouts: Sequence[PictureLayout]) -> tuple[str, Callable[[int], int]]:
        """Returns the text with each picture's own words, and a function from places in the old text to the new."""
        parts = text.split(self._image_text)
        if len(parts) - 1 != len(layouts):
            raise self._refused(f"writes {len(parts) - 1} {self._image_text} for {len(layouts)} pictures")
        lengths = [len(one) for one in parts[:-1]]
        marks = np.cumsum(lengths) + np.arange(len(lengths)) * len(self._image_text)
        grown = np.cumsum([0, *(len(one.text) - len(self._image_text) for one in layouts)])
        whole = parts[0] + "".join(one.text + part for one, part in zip(layouts, parts[1:], strict=True))
        return whole, lambda place: place + int(grown[np.searchsorted(marks, place)])

    def _tokens(self, text: str) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        """Returns ids, and where each token starts and stops in the text.

        The tokenizer adds what it adds to any text, unless the template has begun with its BOS, as in transformers.
        """
        bos = self._tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        found = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=special)
        starts, before = [], 0
        for start, end in found.offsets:
            # Some tokenizers leave out a token's spaces from its place; they belong to it all the same.
            starts.append(before if before < start and text[before:start].isspace() else start)
            before = end
        return np.asarray(found.ids, np.int32), np.asarray(starts, int), np.asarray([stop for _, stop in found.offsets])

    def _expanded(
        self, ids: Int[np.ndarray, " t"], supervised: np.ndarray, layouts: Sequence[PictureLayout]
    ) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        """Writes the image token as often as a picture's runs have positions."""
        runs = [run for one in layouts for run in one.runs]
        places = np.flatnonzero(ids == self._image_id)
        if len(places) != len(runs):
            raise UserError(
                f"{self._folder}: its tokenizer reads {len(places)} image tokens where pictures have {len(runs)}; "
                f"{self._image_text} must be a token of its own"
            )
        times = np.ones(len(ids), int)
        times[places] = runs
        return np.repeat(ids, times), np.repeat(supervised.astype(np.int32), times)

    def _try(self) -> None:
        """Raises `UserError` if the template cannot be used on a plain conversation; finds how it takes content."""
        if _CLOCK in self._text:
            raise self._refused("writes today's date, so that the same record makes other tokens tomorrow")
        single = PictureLayout(1, self._image_text, (1,), np.zeros((1, 1), np.int32))
        with_picture = ((_PROBE[0][0], f"{IMAGE}\n{_PROBE[0][1]}"), *_PROBE[1:])
        self._in_parts = self._takes_parts(with_picture)
        messages = self._messages(_PROBE)
        text, marked = self._render(messages, generation=False, marks=self._marked)
        self._check_complete(_PROBE, text)
        answers = list(self._answers(_PROBE, messages, text, marked))
        endless = [answer.ended is None for answer in answers]
        if any(endless) and not all(endless):
            raise self._refused("ends some answers with a token and not others")
        self._adds_end = all(endless) and self._tokenizer.eos_token is not None
        self._leads_otherwise = any(answer.lead < answer.start for answer in answers)
        tokens, supervised = self.encode(_PROBE, [])
        self.encode(with_picture, [single])
        ends = tokens[(supervised == 1) & (np.append(supervised[1:], 0) == 0)].tolist()
        own = self._tokenizer.eos_token_id
        self.ending_ids = tuple(dict.fromkeys([*([] if own is None else [own]), *ends]))

    def _takes_parts(self, turns: Sequence[Said]) -> bool:
        """Tells whether a message's content is a list of parts; a template of plain texts would write it as one."""
        try:
            text = self._rendered(self._messages(turns))
        except UserError:
            return False
        return "'type'" not in text and '"type"' not in text

    def _refused(self, what: str) -> UserError:
        return UserError(
            f"the chat template of {self._folder} {what}; mend template or record, or name a preset in data.prompt"
        )


def _one_of(words: set[str]) -> re.Pattern[str]:
    """Returns what finds one of `words`, of those that begin alike the longest."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))


def answer_ends(prompt: PromptPreset | Template, tokenizer: Tokenizer, named: Sequence[int]) -> tuple[int, ...]:
    """Returns all tokens that end an answer: of the tokenizer, those that the model has `named`, and the template's."""
    own = prompt.ending_ids if isinstance(prompt, Template) else ()
    return tuple(dict.fromkeys((*tokenizer.ending_ids(named), *own)))


def _transformers_tokenizer(tokenizer: Tokenizer, folder: epath.Path) -> Any:
    # Its one line about a missing PyTorch is no news to anyone here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as copied:
        if is_remote(folder):
            tokenizer.save(copied)
        try:
            found = AutoTokenizer.from_pretrained(copied if is_remote(folder) else str(folder), local_files_only=True)
        except Exception as error:  # it raises whatever a file makes it trip over
            raise UserError(
                f"tokenizer: transformers cannot read {folder} ({_first_line(error)}); download it again, or name a "
                "preset in data.prompt"
            ) from None
    if not found.is_fast:
        raise UserError(
            f"tokenizer: {folder} has no tokenizer.json and transformers cannot make one; add it, or name a preset in "
            "data.prompt"
        )
    return found


def _first_line(error: Exception) -> str:
    return shortened(next(iter(str(error).splitlines()), type(error).__name__))
