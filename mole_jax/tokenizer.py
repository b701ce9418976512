"""Text to token ids with character offsets, from either of the two tokenizer files in use."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mole_jax.errors import UserError
from mole_jax.files import check_no_pointer, made, path_of, read_json, write_bytes

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
BESIDE = (CONFIG_FILE, SPECIAL_FILE, ADDED_FILE, "chat_template.jinja", "chat_template.json")
"""Files that belong to a tokenizer besides the first two."""
_MAX_ID = (1 << 24) - 1
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that stands beside a sentencepiece model and is no piece of it."""

    id: int
    text: str
    special: bool = False
    """It is put in by prompts alone: in a text its characters are ordinary ones."""
    lstrip: bool = False
    """White space before it belongs to it."""
    rstrip: bool = False
    """White space after it belongs to it."""
    single_word: bool = False
    """It is none within a word."""

    @property
    def pattern(self) -> str:
        before = r"\s*" if self.lstrip else ""
        after = r"\s*" if self.rstrip else ""
        inner = re.escape(self.text)
        return before + (rf"(?<!\w){inner}(?!\w)" if self.single_word else inner) + after


class Tokenizer:
    """A sentencepiece (tokenizer.model) or Hugging Face (tokenizer.json) tokenizer.

    It encodes plain text only: `</s>` and the like inside a text are ordinary characters, so that a
    record cannot end its own turn. Special tokens are put in by the prompt, as ids. Other tokens that were added
    beside the model's own (added_tokens.json, tokenizer_config.json) are single ids wherever they stand; the text
    between two of them is encoded by itself, as around an image. Instances can be pickled and hold everything in
    memory.

    Attributes:
      bos_id: id that starts a sequence; None for a tokenizer without one.
      eos_id: id that closes an answer.
      pad_id: id for padding; the unknown token's where there is no padding token.
      vocab_size: number of ids that the tokenizer knows.
      source_files: files that `save` copies.
    """

    _model: Any
    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int

    def __init__(self, kind: str, content: bytes, settings: Mapping[str, Any], source_files: Sequence[epath.Path]):
        """Use `Tokenizer.load`."""
        self.source_files = tuple(source_files)
        self._kind, self._content, self._settings = kind, content, dict(settings)
        self._build()

    @classmethod
    def load(cls, path: str | epath.Path) -> Tokenizer:
        """Loads a folder's tokenizer.model (preferred) or tokenizer.json, or one such file.

        Raises:
          UserError: nothing there, not a tokenizer file, no end-of-sequence token, or files beside it that do not fit.
        """
        path = path_of(path)
        if path.is_dir():
            found = [path / name for name in (MODEL_FILE, JSON_FILE) if (path / name).is_file()]
            if not found:
                raise UserError(f"tokenizer: {path} has neither {MODEL_FILE} nor {JSON_FILE}; give model.tokenizer")
            path = found[0]
        elif not path.is_file():
            raise UserError(f"tokenizer: {path} does not exist; give a folder or file in model.tokenizer")
        check_no_pointer(path)
        kind = "huggingface" if path.suffix == ".json" else "sentencepiece"
        names = BESIDE if kind == "huggingface" else (JSON_FILE, *BESIDE)
        beside = [path.parent / name for name in names if (path.parent / name).is_file()]
        try:
            return cls(kind, path.read_bytes(), _settings(path.parent), [path, *beside])
        except UserError as error:
            raise UserError(f"tokenizer: {path}: {error}") from None
        except OSError as error:
            raise UserError(f"tokenizer: {path}: cannot be read ({error.strerror}); put it back") from None

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of `text`, no BOS added, and each one's (start, end) in characters of `text`."""
        if not text:
            return [], []
        if self._kind == "sentencepiece":
            return self._encode_sentencepiece(text)
        encoding = self._model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens and ids outside the vocabulary are left out."""
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and int(i) not in self._special]
        return self._decode_sentencepiece(kept) if self._kind == "sentencepiece" else self._model.decode(kept)

    def is_special(self, token: int) -> bool:
        """Tells whether a token is no part of a text: it begins, ends or pads one, or holds an image's place."""
        return token in self._special

    def ending_ids(self, named: Sequence[int]) -> tuple[int, ...]:
        """Returns the tokens that end an answer: the end of sequence, and those of the ones that the model has `named`.

        Of a model whose ids do not have the tokenizer's among them, only those count that are special in it: the others
        are of another vocabulary, as where a config brings a tokenizer of its own.
        """
        of_one = self.eos_id in named
        return tuple(dict.fromkeys((self.eos_id, *(one for one in named if of_one or self.is_special(one)))))

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token by its text in the vocabulary."""
        if self._kind == "huggingface":
            return self._model.token_to_id(token)
        if token in self._added:
            return self._added[token].id
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def token(self, id: int) -> str | None:
        """Returns the text of a token in the vocabulary; None where there is none of that id."""
        if self._kind == "huggingface":
            return self._model.id_to_token(id)
        if id < self._model.get_piece_size():
            return self._model.id_to_piece(id)
        return next((one.text for one in self._added.values() if one.id == id), None)

    @property
    def roles(self) -> Mapping[str, str | None]:
        """The tokens that the files name for a role (``bos_token``, ``pad_token``, …); None: they say it has none."""
        return self._settings["roles"]

    @property
    def added(self) -> tuple[AddedToken, ...]:
        """The tokens that stand beside a sentencepiece model; of another kind, which holds its own, none."""
        return tuple(self._added.values()) if self._kind == "sentencepiece" else ()

    def save(self, folder: str | epath.Path) -> None:
        """Copies the tokenizer's files into `folder`, under their usual names: also tokenizer.json beside a model."""
        folder = made(epath.Path(folder))
        write_bytes(folder / (MODEL_FILE if self._kind == "sentencepiece" else JSON_FILE), self._content)
        for file in self.source_files[1:]:
            if file.exists() and file.parent != folder:
                write_bytes(folder / file.name, file.read_bytes())

    def __getstate__(self) -> dict:
        return {name: vars(self)[name] for name in ("source_files", "_kind", "_content", "_settings")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._build()

    def _build(self) -> None:
        if self._kind == "sentencepiece":
            self._build_sentencepiece()
        else:
            self._build_huggingface()

    def _build_sentencepiece(self) -> None:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(self._content)
        except Exception as error:
            raise UserError(f"not a sentencepiece model ({_first_line(error)}); download it again") from None
        self._model = model
        pieces = model.get_piece_size()
        self._added = self._added_tokens(model)
        self.vocab_size = max([pieces, *(one.id + 1 for one in self._added.values())])
        self._special = {i for i in range(pieces) if model.is_control(i) or model.is_unknown(i)}
        self._special |= {one.id for one in self._added.values() if one.special}
        own = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "pad_token": model.pad_id()}
        named = {role: self._named_id(role, None if id < 0 else id) for role, id in own.items()}
        if named["eos_token"] is None:
            raise UserError("it has no end-of-sequence piece; use the tokenizer of a LLaVA checkpoint")
        self.bos_id, self.eos_id = named["bos_token"], named["eos_token"]
        self.pad_id = model.unk_id() if named["pad_token"] is None else named["pad_token"]
        self._special |= {i for i in (self.bos_id, self.eos_id) if i is not None}
        plain = [one for one in self._added.values() if not one.special and one.id not in self._special]
        # The longest first, or a token that begins like another one would hide it.
        plain.sort(key=lambda one: -len(one.text))
        self._plain = {f"t{one.id}": one for one in plain}
        alternatives = "|".join(f"(?P<{group}>{one.pattern})" for group, one in self._plain.items())
        self._split = re.compile(alternatives) if plain else None

    def _added_tokens(self, model: Any) -> dict[str, AddedToken]:
        """Returns the tokens beside the pieces of a sentencepiece model by their text.

        Raises:
            UserError: one stands where the model has another piece, or two stand at one id.
        """
        texts: dict[int, str] = {}
        found: dict[str, AddedToken] = {}
        for one in self._settings["added"]:
            piece = model.id_to_piece(one.id) if one.id < model.get_piece_size() else None
            other = piece if piece is not None else texts.setdefault(one.id, one.text)
            if other != one.text:
                raise UserError(f"the files beside it add {one.text!r} as {one.id}, which is {other!r} already")
            if piece is None:
                found.setdefault(one.text, one)
        return found

    def _encode_sentencepiece(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []

        def add(start: int, end: int) -> None:
            own, places = _pieces(self._model, text[start:end])
            ids.extend(own)
            offsets.extend((start + first, start + last) for first, last in places)

        done = 0
        for match in self._split.finditer(text) if self._split else ():
            add(done, match.start())
            ids.append(self._plain[str(match.lastgroup)].id)
            offsets.append(match.span())
            done = match.end()
        add(done, len(text))
        return ids, offsets

    def _decode_sentencepiece(self, ids: Sequence[int]) -> str:
        text, run = "", list[int]()
        texts = {one.id: one.text for one in self._added.values()}
        for one in ids:
            if one < self._model.get_piece_size():
                run.append(one)
            elif one in texts:
                text, run = text + self._model.decode(run) + texts[one], []
        return text + self._model.decode(run)

    def _build_huggingface(self) -> None:
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not a tokenizer.json ({_first_line(error)}); download it again") from None
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True
        self._model = model
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._special = {i for i, token in model.get_added_tokens_decoder().items() if token.special}
        self.bos_id = self._named_id("bos_token", self._first_id("<s>", "<|begin_of_text|>"))
        eos_id = self._named_id("eos_token", self._first_id("</s>", "<|end_of_text|>", "<|endoftext|>"))
        if eos_id is None:
            raise UserError(f"no end-of-sequence token is known; name it as eos_token in {CONFIG_FILE} beside it")
        self.eos_id = eos_id
        pad_id = self._named_id("pad_token", self._first_id("<pad>"))
        unknown = self._named_id("unk_token", self._first_id("<unk>"))
        self.pad_id = next((i for i in (pad_id, unknown) if i is not None), self.eos_id)

    def _named_id(self, role: str, usual: int | None) -> int | None:
        """Returns the id of the token that the settings name for a role; where they do not, the `usual` one."""
        if role not in self._settings["roles"]:
            return usual
        token = self._settings["roles"][role]
        if token is None:
            return None
        found = self.id_of(token)
        if found is None and role in ("bos_token", "eos_token"):
            raise UserError(f"{CONFIG_FILE} names {role} '{token}', which is not in its vocabulary")
        # transformers would add a padding token of that name, for which the model has no row.
        return usual if found is None else found

    def _first_id(self, *tokens: str) -> int | None:
        return next((i for i in map(self.id_of, tokens) if i is not None), None)


def _settings(folder: epath.Path) -> dict[str, Any]:
    """Returns what the files beside a tokenizer say: `roles`, token or None by role, and `added`, `AddedToken`s."""
    files = {}
    for name in (CONFIG_FILE, SPECIAL_FILE, ADDED_FILE):
        try:
            files[name] = read_json(folder / name) if (folder / name).is_file() else {}
        except UserError as error:
            raise UserError(f"tokenizer: {error}; download it again") from None
    roles = {
        role: _text(named[role])
        for named in (files[SPECIAL_FILE], files[CONFIG_FILE])
        for role in ROLES
        if role in named
    }
    return {"roles": roles, "added": list(_added(files, {one for one in roles.values() if one}, folder))}


def _added(files: Mapping[str, Any], special: set[str], folder: epath.Path) -> Iterator[AddedToken]:
    """Yields the added tokens that the files name; those of tokenizer_config.json, which says most of them, first."""
    for named in (files[SPECIAL_FILE], files[CONFIG_FILE]):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = named.get(key) or ()
            special = special | {
                text for one in (more.values() if isinstance(more, dict) else more) if (text := _text(one))
            }
    decoder, listed = files[CONFIG_FILE].get("added_tokens_decoder") or {}, files[ADDED_FILE]
    try:
        for number, one in decoder.items():
            flags = {key: one.get(key) is True for key in ("lstrip", "rstrip", "single_word")}
            text = one["content"]
            yield AddedToken(_number(number), _word(text), one.get("special") is True or text in special, **flags)
        for text, number in listed.items():
            yield AddedToken(_number(number), _word(text), text in special)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"tokenizer: {folder}: the tokens that {CONFIG_FILE} or {ADDED_FILE} adds are not texts with ids of 0 to "
            f"{_MAX_ID:,}; download the files again"
        ) from None


def _number(value: Any) -> int:
    number = int(value)
    if not 0 <= number <= _MAX_ID:
        raise ValueError(number)
    return number


def _word(text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise ValueError(text)
    return text


def _text(token: Any) -> str | None:
    """Returns the text of a token, which files give as such or as an object; None where it is neither."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _pieces(model: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not text:
        return [], []
    if hasattr(model, "EncodeAsOffsetMapping"):
        found = model.EncodeAsOffsetMapping(text)
        return found["ids"], found["offsets"]
    pieces = model.encode(text, out_type="immutable_proto").pieces  # sentencepiece before 0.2.2
    return [p.id for p in pieces], [(p.begin, p.end) for p in pieces]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
