"""Tokenizers against reference ids, and their files."""

from __future__ import annotations

import json
import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_jax.errors import UserError
from mole_jax.tokenizer import Tokenizer


def test_llama_ids_are_the_reference_ones(reference, llama_tokenizer):
    cases = json.loads(reference("metrics/llama_tokenizer.json").read_text(encoding="utf-8"))
    for group in ("llama_tokenizer_js", "transformers_plain"):
        for text, ids, *_ in cases[group]:
            assert [llama_tokenizer.bos_id, *llama_tokenizer.encode(text)[0]] == ids, text


def test_llama_special_ids(llama_tokenizer):
    special = (llama_tokenizer.bos_id, llama_tokenizer.eos_id, llama_tokenizer.pad_id, llama_tokenizer.vocab_size)
    assert special == (1, 2, 0, 32000)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁\0"), max_size=40))
def test_offsets_cover_the_text_in_order(text, tokenizer):
    ids, offsets = tokenizer.encode(text)
    assert len(ids) == len(offsets)
    assert [end for _, end in offsets[:-1]] == [start for start, _ in offsets[1:]]
    if text:
        assert (offsets[0][0], offsets[-1][1]) == (0, len(text))
    assert tokenizer.decode(ids) == text


def test_special_tokens_in_a_text_are_ordinary_text(tokenizer):
    ids, _ = tokenizer.encode("a</s>b<s>")
    assert tokenizer.eos_id not in ids
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode(ids) == "a</s>b<s>"


def test_decode_leaves_special_and_foreign_ids_away(tokenizer):
    ids, _ = tokenizer.encode("It is red.")
    foreign = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.vocab_size, -200]
    assert tokenizer.decode(foreign) == "It is red."


def test_pickle_and_save_keep_the_ids(tokenizer, tmp_path):
    text = "There are three small circles, Würfel 🙂."
    expected = tokenizer.encode(text)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == expected
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").encode(text) == expected


def _json_tokenizer(folder, eos: str = "</s>", settings: dict | None = None):
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", eos], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["It is red. It is blue. What is it?"] * 5, trainer)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_tokenizer_json_with_its_config(tmp_path):
    folder = _json_tokenizer(tmp_path / "t", "<end>", {"eos_token": {"content": "<end>"}, "bos_token": None})
    loaded = Tokenizer.load(folder)
    ids, offsets = loaded.encode("It is <end> ü.")
    assert loaded.decode(ids) == "It is <end> ü."
    assert loaded.eos_id not in ids
    assert loaded.bos_id is None
    assert offsets[-1][1] == len("It is <end> ü.")
    assert pickle.loads(pickle.dumps(loaded)).eos_id == loaded.eos_id == 2
    loaded.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").eos_id == loaded.eos_id


def test_the_model_file_is_preferred(tmp_path, tokenizer_file, tokenizer):
    folder = _json_tokenizer(tmp_path / "both")
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    assert Tokenizer.load(folder).encode("It is red.") == tokenizer.encode("It is red.")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "none does not exist"),
        (lambda folder: folder, "has neither tokenizer.model nor tokenizer.json"),
        (lambda folder: _file(folder / "tokenizer.model", b"not a model"), "not a sentencepiece model"),
        (lambda folder: _file(folder / "tokenizer.json", b"{}"), r"not a tokenizer\.json"),
        (lambda folder: _json_tokenizer(folder / "t", "<end>"), "no end-of-sequence token is known"),
        (lambda folder: _json_tokenizer(folder / "t", "</s>", {"eos_token": "<other>"}), "names eos_token '<other>'"),
    ],
)
def test_a_wrong_tokenizer_is_refused(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(make(tmp_path))
    assert "\n" not in str(caught.value)


def _file(path, content):
    path.write_bytes(content)
    return path
