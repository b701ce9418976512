"""A tokenizer as transformers takes it: ``tokenizer.json`` with ``<image>`` and ``<pad>``, its config, a chat template.

Text becomes the ids that it becomes here. A special token written in a text is one to transformers; to us it is
ordinary characters (`sanitize_control_tokens=True` of `apply_chat_template` makes it so there too).

Ids: ``<image>`` is the model's image token. ``<pad>`` is the next id if no token has it, else the one before, else the
first free row from the end of the embedding: in LLaVA-1.5's vocabulary 32000 and 32001. Tokens that stand there already
are kept under their names. Where no row is free the embedding grows by rows that are the mean of the others, to a
multiple of 64; where it cannot grow, the unknown token pads.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mole_jax.errors import UserError
from mole_jax.files import PathLike, read_json, write_json, write_text
from mole_jax.prompts import IMAGE, PROMPTS, chat_template
from mole_jax.tokenizer import (
    ADDED_FILE,
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    SPECIAL_FILE,
    AddedToken,
    Tokenizer,
)
from mole_jax.weights.leaf import Leaf, Leaves, as_leaf

TEMPLATE_FILE, OLD_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
PAD = "<pad>"
MULTIPLE = 64
"""Rows of a grown embedding are a multiple of this."""
EMBEDDING, HEAD = "decoder/embedding", "decoder/head/kernel"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclasses.dataclass(frozen=True)
class HfTokenizer:
    """A tokenizer with the tokens that an export adds to it."""

    tokenizer: Tokenizer
    image: AddedToken
    pad: AddedToken
    vocab: int
    """Rows that the embedding must have."""

    @classmethod
    def of(cls, folder: PathLike, *, image_id: int, vocab: int, grows: bool = True) -> HfTokenizer:
        """Chooses the ids.

        Args:
            folder: the tokenizer's.
            image_id: the model's image token.
            vocab: rows of its embedding.
            grows: they may become more.

        Raises:
            UserError: there is no tokenizer, or its tokens leave no place for the image token.
        """
        tokenizer = Tokenizer.load(str(folder))
        there = tokenizer.token(image_id)
        if there is None and tokenizer.id_of(IMAGE) is not None:
            raise UserError(
                f"tokenizer: {folder}: has {IMAGE} as {tokenizer.id_of(IMAGE)}, the model as {image_id}; "
                "use the tokenizer that belongs to the checkpoint"
            )
        if there is not None and not tokenizer.is_special(image_id) and there != IMAGE:
            raise UserError(
                f"tokenizer: {folder}: has the word {there!r} as {image_id}, where the model has images; "
                "use the tokenizer that belongs to the checkpoint"
            )
        image = AddedToken(image_id, there or IMAGE, special=True)
        pad = _pad(tokenizer, image_id, vocab, grows)
        rows = max(vocab, image_id + 1 if grows else 0, pad.id + 1)
        return cls(tokenizer, image, pad, vocab if rows == vocab else -(-rows // MULTIPLE) * MULTIPLE)

    def write(self, folder: PathLike, prompt: str | None, processor: str) -> None:
        """Writes tokenizer.json, tokenizer_config.json, the chat template, and tokenizer.model where there is one.

        Args:
            folder: where to.
            prompt: name of the preset that the weights were trained with. None: they do not say; the tokenizer's own
                chat template stays with all that belongs to it, and v1 is written where it has none.
            processor: class of transformers that puts tokenizer and image processor together.

        Raises:
            UserError: the tokenizer has something that transformers cannot do, or the files cannot be written.
        """
        folder, own = epath.Path(folder), self.tokenizer
        own.save(str(folder))
        config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        preset = PROMPTS.get(prompt or "")
        theirs = None if preset else _template(folder, config)
        preset = preset or PROMPTS["v1"]
        model, where = folder / MODEL_FILE, folder / JSON_FILE
        adds = {name: config[name] for name in ("add_bos_token", "add_eos_token") if name in config}
        bos = None if own.bos_id is None else own.token(own.bos_id)
        if model.is_file() and not (theirs and where.is_file()):
            content = from_sentencepiece(model.read_bytes(), (*own.added, self.image, self.pad), where=str(model))
            adds = {"add_bos_token": bos is not None, "add_eos_token": False} | adds  # as Llama's
            content["post_processor"] = _first(bos, own.bos_id) if bos and adds["add_bos_token"] else None
        else:
            content = read_json(where)
            _add(content, (self.image, self.pad))
        if theirs is None:
            # As the weights were trained. Not in the template: a text made by it, tokenized later, would have two.
            first = bos if preset.bos else None
            adds = {"add_bos_token": first is not None, "add_eos_token": False}
            content["post_processor"] = _first(first, own.bos_id) if first else None
            _prefix_always(content.get("pre_tokenizer"))
        content |= {"truncation": None, "padding": None}
        self._check(content, where=str(where))
        write_json(where, content, indent=2)
        write_json(folder / CONFIG_FILE, self._config(content, config, processor) | adds, indent=2)
        ours = chat_template(preset, image=self.image.text)
        write_text(folder / TEMPLATE_FILE, theirs or ours)
        for name in (SPECIAL_FILE, ADDED_FILE, OLD_TEMPLATE_FILE):
            (folder / name).unlink(missing_ok=True)  # tokenizer_config.json says what they say

    def _check(self, content: Mapping[str, Any], where: str) -> None:
        """Raises `UserError` if the library gives a token another id than the file says."""
        import tokenizers

        made = tokenizers.Tokenizer.from_str(json.dumps(content))
        for one in content["added_tokens"]:
            if made.token_to_id(one["content"]) != one["id"]:
                raise UserError(
                    f"{where}: {one['content']!r} is to be {one['id']} and would become "
                    f"{made.token_to_id(one['content'])}; use the tokenizer that belongs to the checkpoint"
                )

    def _config(self, content: Mapping[str, Any], theirs: Mapping[str, Any], processor: str) -> dict[str, Any]:
        own = self.tokenizer
        ids = {"bos_token": own.bos_id, "eos_token": own.eos_id, "pad_token": self.pad.id}
        unknown = own.roles.get("unk_token", "<unk>")
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        kept = ("clean_up_tokenization_spaces", "model_max_length", "padding_side")
        return {
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",  # where answers are generated for several prompts at once
            **{name: theirs[name] for name in kept if name in theirs},
            **{role: None if id is None else own.token(id) or self.pad.text for role, id in ids.items()},
            "unk_token": unknown if unknown is not None and own.id_of(unknown) is not None else None,
            "extra_special_tokens": {**_named(theirs), "image_token": self.image.text},
            "added_tokens_decoder": {
                str(one["id"]): {flag: one[flag] for flag in flags} for one in content["added_tokens"]
            },
            "processor_class": processor,
            "tokenizer_class": "PreTrainedTokenizerFast",  # which takes tokenizer.json as it is
        }


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the further tokens that a tokenizer's config names, such as those around a picture, by name."""
    standard = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    extra = config.get("extra_special_tokens")
    found = {**config, **(extra if isinstance(extra, Mapping) else {})}
    return {
        name: text
        for name, text in found.items()
        if name.endswith("_token") and isinstance(text, str) and name not in standard
    }


def with_rows(leaves: Leaves, vocab: int) -> Leaves:
    """Returns the arrays with an embedding and a head of `vocab` rows, those added being the mean of the others.

    The mean of some logits is never the largest of them, so that no added token is ever the likeliest.
    """

    def grown(path: str, axis: int) -> Leaf:
        leaf = as_leaf(path, leaves[path])
        shape = tuple(vocab if i == axis else size for i, size in enumerate(leaf.shape))

        def read(_: int) -> np.ndarray:
            whole = np.asarray(leaf)
            mean = whole.mean(axis, np.float32, keepdims=True).astype(whole.dtype)
            return np.concatenate([whole, np.repeat(mean, vocab - leaf.shape[axis], axis)], axis)

        return dataclasses.replace(leaf, shape=shape, read=read)

    places = ((EMBEDDING, 0), (HEAD, 1))
    short = [(path, axis) for path, axis in places if path in leaves and leaves[path].shape[axis] < vocab]
    return {**leaves, **{path: grown(path, axis) for path, axis in short}}


def from_sentencepiece(content: bytes, added: Iterable[AddedToken] = (), *, where: str) -> dict[str, Any]:
    """Returns the tokenizer.json that makes the ids of a sentencepiece model.

    Where that model normalises characters (nmt_nfkc, unlike Llama's), the tokenizers library does so by clusters of
    them and now and then drops a combining mark of a rare script.

    Args:
        content: the model.
        added: tokens that stand beside it.
        where: what messages call it.

    Raises:
        UserError: the model is of a kind, or has pieces, that a tokenizer.json has no place for.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # its classes are made at import, where no type checker sees them
    model = proto.ModelProto.FromString(content)
    trained, rule, kinds = model.trainer_spec, model.normalizer_spec, proto.ModelProto.SentencePiece
    odd = [one.piece for one in model.pieces if one.type in (kinds.USER_DEFINED, kinds.UNUSED)]
    if odd or trained.treat_whitespace_as_suffix:
        what = f"pieces as {odd[0]!r}, which are no text" if odd else "spaces at the end of words"
        raise UserError(
            f"{where}: has {what}, for which tokenizer.json has no place; name a folder with that model's own "
            f"{JSON_FILE} and no {MODEL_FILE} as model.tokenizer"
        )
    if trained.model_type == trained.BPE:
        kind = {
            "type": "BPE",
            "vocab": {one.piece: number for number, one in enumerate(model.pieces)},
            "merges": _merges({one.piece: one.score for one in model.pieces if one.type == kinds.NORMAL}),
            "unk_token": model.pieces[trained.unk_id].piece,
            "fuse_unk": True,
        }
    elif trained.model_type == trained.UNIGRAM:
        kind = {
            "type": "Unigram",
            "vocab": [[one.piece, one.score] for one in model.pieces],
            "unk_id": trained.unk_id,
        }
    else:
        raise UserError(f"{where}: is neither BPE nor unigram, and tokenizer.json knows no other kind")
    steps = []
    if rule.precompiled_charsmap:
        charsmap = base64.b64encode(rule.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rule.remove_extra_whitespaces:
        steps += [_replace({"Regex": "^ +| +$"}, ""), _replace({"Regex": " +"}, " ")]
    if rule.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE if rule.escape_whitespaces else " "})
    if rule.escape_whitespaces:
        steps.append(_replace({"String": " "}, _SPACE))
    words = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if rule.add_dummy_prefix:
        words.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    special = [
        AddedToken(number, one.piece, special=True)
        for number, one in enumerate(model.pieces)
        if one.type in (kinds.CONTROL, kinds.UNKNOWN)
    ]
    made = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": words},
        "model": kind | {"byte_fallback": trained.byte_fallback},
    }
    _add(made, (*special, *added))
    if kind["type"] == "Unigram":
        own = [one.piece for one in model.pieces if one.type == kinds.BYTE]
        made["pre_tokenizer"] = _apart([*own, *(one["content"] for one in made["added_tokens"] if one["special"])])
    return made


def _apart(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the step that cuts these texts behind their first character: a unigram model would find them whole.

    They are special tokens, which a text never holds, and bytes, of which it is made only where a piece is missing.
    """
    rest: dict[str, list[str]] = {}
    for text in texts:
        rest.setdefault(re.escape(text[0]), []).append(re.escape(text[1:]))
    cuts = "|".join(f"(?<={first})(?={'|'.join(others)})" for first, others in rest.items())
    return {"type": "Split", "pattern": {"Regex": cuts}, "behavior": "Isolated", "invert": False}


def _replace(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _merges(scores: Mapping[str, float]) -> list[list[str]]:
    """Returns the pairs that join to a piece, that of the highest score first, as sentencepiece joins them."""
    number = {piece: place for place, piece in enumerate(scores)}
    found = [
        (-score, number[piece[:cut]], number[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in number and piece[cut:] in number
    ]
    return [[left, right] for *_, left, right in sorted(found)]


def _pad(tokenizer: Tokenizer, image_id: int, vocab: int, grows: bool) -> AddedToken:
    """Returns the token for padding: the tokenizer's, unless it lends another one for it, or `<pad>` at a free id."""
    there = tokenizer.id_of(PAD)
    lent = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.id_of(tokenizer.roles.get("unk_token") or "<unk>"))
    own = tokenizer.pad_id if tokenizer.pad_id not in lent and tokenizer.pad_id != image_id else there
    if own is not None and own < vocab:
        return AddedToken(own, str(tokenizer.token(own)), special=True)
    near = (image_id + 1, image_id - 1, *range(vocab - 1, -1, -1))
    free = (one for one in near if one != image_id and 0 <= one < vocab and tokenizer.token(one) is None)
    id = next(free, max(vocab, image_id + 1, tokenizer.vocab_size) if grows else None)
    if id is None:
        return AddedToken(tokenizer.pad_id, str(tokenizer.token(tokenizer.pad_id)), special=True)
    return AddedToken(id, PAD, special=True)


def _add(content: dict[str, Any], tokens: Iterable[AddedToken]) -> None:
    """Adds the tokens to the content of a tokenizer.json, each at its id."""
    have = {one["content"]: one for one in content.get("added_tokens") or ()}
    for one in tokens:
        flags = {"single_word": one.single_word, "lstrip": one.lstrip, "rstrip": one.rstrip, "normalized": False}
        have.setdefault(one.text, {"id": one.id, "content": one.text, **flags, "special": one.special})
    content["added_tokens"] = sorted(have.values(), key=lambda one: one["id"])
    vocab = content["model"]["vocab"]
    beyond = [one for one in content["added_tokens"] if one["id"] >= len(vocab)]
    if [one["id"] for one in beyond] == list(range(len(vocab), len(vocab) + len(beyond))):
        return
    # The library counts added tokens on from the vocabulary; where they leave gaps it finds their ids in it.
    if isinstance(vocab, dict):
        vocab |= {one["content"]: one["id"] for one in content["added_tokens"]}
        return
    least = min(score for _, score in vocab)
    texts = {one["id"]: one["content"] for one in beyond}
    # No text has this piece: its spaces have become another character when it is cut.
    vocab += [[texts.get(id, f"<unused {id}>"), least] for id in range(len(vocab), max(texts) + 1)]


def _prefix_always(step: Any) -> None:
    """Makes a text after a special token begin as at the start, as here, where each is encoded by itself."""
    if isinstance(step, dict):
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "always"
        for one in step.get("pretokenizers") or ():
            _prefix_always(one)


def _first(token: str, id: int | None) -> dict[str, Any]:
    """Returns the step that puts BOS before a text."""
    special, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def _template(folder: epath.Path, config: Mapping[str, Any]) -> str | None:
    """Returns the chat template in a folder, which may be in any of three files."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text("utf-8")
    old = folder / OLD_TEMPLATE_FILE
    found = (read_json(old) if old.is_file() else config).get("chat_template")
    return found if isinstance(found, str) and found else None
