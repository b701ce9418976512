"""Text to token ids with character offsets, from either of the two tokenizer files in use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from mole_jax.errors import UserError
from mole_jax.files import write_bytes

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Tokenizer:
    """A sentencepiece (tokenizer.model) or Hugging Face (tokenizer.json) tokenizer.

    It encodes plain text only: `</s>` and the like inside a text are ordinary characters, so that a
    record cannot end its own turn. Special tokens are put in by the prompt, as ids. Instances can be
    pickled and hold everything in memory.

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

    def __init__(self, kind: str, content: bytes, settings: dict, source_files: Sequence[epath.Path]):
        """Use `Tokenizer.load`."""
        self.source_files = tuple(source_files)
        self._kind, self._content, self._settings = kind, content, settings
        self._build()

    @classmethod
    def load(cls, path: str | epath.Path) -> Tokenizer:
        """Loads a folder's tokenizer.model (preferred) or tokenizer.json, or one such file.

        Raises:
          UserError: nothing there, not a tokenizer file, or no end-of-sequence token.
        """
        path = epath.Path(path)
        if path.is_dir():
            found = [path / name for name in (MODEL_FILE, JSON_FILE) if (path / name).exists()]
            if not found:
                raise UserError(f"tokenizer: {path} has neither {MODEL_FILE} nor {JSON_FILE}; give model.tokenizer")
            path = found[0]
        elif not path.is_file():
            raise UserError(f"tokenizer: {path} does not exist; give a folder or file in model.tokenizer")
        kind = "huggingface" if path.suffix == ".json" else "sentencepiece"
        beside = [path.parent / name for name in CONFIG_FILES if (path.parent / name).is_file()]
        settings = {}
        if kind == "huggingface" and (config := path.parent / CONFIG_FILES[0]).is_file():
            try:
                settings = json.loads(config.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"tokenizer: {config} is not JSON ({error}); download it again") from None
        try:
            return cls(kind, path.read_bytes(), settings, [path, *beside])
        except UserError as error:
            raise UserError(f"tokenizer: {path}: {error}") from None

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of `text`, no BOS added, and each one's (start, end) in characters of `text`."""
        if not text:
            return [], []
        if self._kind == "sentencepiece":
            return _encode_sentencepiece(self._model, text)
        encoding = self._model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens and ids outside the vocabulary are left out."""
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and int(i) not in self._special]
        return self._model.decode(kept)

    def save(self, folder: str | epath.Path) -> None:
        """Copies the tokenizer's files into `folder`, under their usual names."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
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
        if model.eos_id() < 0:
            raise UserError("it has no end-of-sequence piece; use the tokenizer of a LLaVA checkpoint")
        self._model = model
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.eos_id = model.eos_id()
        self.pad_id = model.pad_id() if model.pad_id() >= 0 else model.unk_id()
        self.vocab_size = model.get_piece_size()
        self._special = {i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)}

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
        self.vocab_size = model.get_vocab_size(with_added_tokens=True)
        self._special = {i for i, token in model.get_added_tokens_decoder().items() if token.special}
        self.bos_id = self._special_id("bos_token", ("<s>", "<|begin_of_text|>"))
        eos_id = self._special_id("eos_token", ("</s>", "<|end_of_text|>", "<|endoftext|>"))
        if eos_id is None:
            raise UserError(f"no end-of-sequence token is known; name it as eos_token in {CONFIG_FILES[0]} beside it")
        self.eos_id = eos_id
        pad_id = self._special_id("pad_token", ("<pad>",))
        unknown = self._special_id("unk_token", ("<unk>",))
        self.pad_id = next((i for i in (pad_id, unknown) if i is not None), self.eos_id)

    def _special_id(self, role: str, usual: tuple[str, ...]) -> int | None:
        if role in self._settings:
            token = self._settings[role]
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:
                return None
            if self._model.token_to_id(token) is None:
                raise UserError(f"{CONFIG_FILES[0]} names {role} '{token}', which is not in its vocabulary")
            return self._model.token_to_id(token)
        return next((i for i in map(self._model.token_to_id, usual) if i is not None), None)


def _encode_sentencepiece(model, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if hasattr(model, "EncodeAsOffsetMapping"):
        found = model.EncodeAsOffsetMapping(text)
        return found["ids"], found["offsets"]
    pieces = model.encode(text, out_type="immutable_proto").pieces  # sentencepiece before 0.2.2
    return [p.id for p in pieces], [(p.begin, p.end) for p in pieces]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
