"""Builds the small tokenizer that goes with the synthetic data."""

from __future__ import annotations

import collections
import os
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from mole_jax.errors import UserError
from mole_jax.files import made, write_bytes
from mole_jax.synthetic import language

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The sentence that opens the v1 prompt."""

sentencepiece_model: Any = sentencepiece_model_pb2
"""Its classes are made at import, where no type checker sees them."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_WORD = re.compile(r"[A-Za-z]+|[^A-Za-z0-9\s]")
_CHARACTERS = string.digits + ".,:;?'"
"""Characters that the data needs outside words; any other is spelled in bytes."""


def train_tokenizer(texts: Iterable[str], folder: str | os.PathLike[str], vocab_size: int = 511) -> Path:
    """Makes a unigram sentencepiece model, writes `folder/tokenizer.model` and returns that path.

    Pieces are, as far as `vocab_size` reaches, the whole words of `texts` (questions and answers), of the v1
    prompt and of the synthetic questions, the most frequent first. Ids 0, 1 and 2 are unk, bos and eos, as
    Llama's are; digits stand alone; what is no piece is spelled in bytes, so no text is unknown. The same
    texts give the same bytes. Raises `UserError` where `vocab_size` has no room for bytes and characters.
    """
    # The library's own training finds word parts by frequency and would spend the few hundred pieces on them;
    # this vocabulary is closed, so its words can simply be listed.
    model = sentencepiece_model.ModelProto()
    kinds = sentencepiece_model.ModelProto.SentencePiece
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=kinds.BYTE)
    # Encoding maximises the sum of scores: one word beats any way of spelling it.
    for piece in (_SPACE, *_CHARACTERS):
        model.pieces.add(piece=piece, score=-20.0, type=kinds.NORMAL)
    if vocab_size < len(model.pieces):
        raise UserError(f"tokenizer: vocab_size is {vocab_size}, bytes and characters alone take {len(model.pieces)}")
    for piece in _words(texts)[: vocab_size - len(model.pieces)]:
        model.pieces.add(piece=piece, score=-1.0, type=kinds.NORMAL)

    model.trainer_spec.model_type = sentencepiece_model.TrainerSpec.UNIGRAM
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 0, 1
    model.trainer_spec.eos_id, model.trainer_spec.pad_id = 2, -1
    model.trainer_spec.split_digits = True
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    path = made(Path(folder)) / "tokenizer.model"
    write_bytes(path, model.SerializeToString(deterministic=True))
    return path


def _words(texts: Iterable[str]) -> list[str]:
    """Pieces of more than one character: the prompt's and the questions' first, then by falling frequency."""
    questions = [question for asked in (language.SHARED, *language.OWN.values()) for question in asked.values()]
    counts: collections.Counter[str] = collections.Counter()
    for weight, batch in ((10**9, [SYSTEM, "USER: ASSISTANT:", *questions]), (1, texts)):
        for text in batch:
            for number, word in enumerate(text.split()):
                if found := _WORD.match(word):
                    counts[_SPACE + found[0]] += weight
                    # The first word of a question follows a line break, so it has no space before it.
                    if number == 0 and len(found[0]) > 1:
                        counts[found[0]] += weight
    return sorted(counts, key=lambda piece: (-counts[piece], piece))
