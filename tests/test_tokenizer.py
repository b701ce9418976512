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


def _beside(folder, tokenizer_file, **files):
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def _token(content: str, **flags) -> dict:
    return {"content": content, "special": False} | flags


def test_tokens_added_beside_a_model_are_single_ids(tmp_path, tokenizer_file, tokenizer):
    size = tokenizer.vocab_size
    decoder = {
        str(size): _token("<image>", special=True),
        str(size + 1): _token("<pad>", special=True),
        str(size + 2): _token("<loc1>"),
        str(size + 3): _token("<loc12>"),
        "2": _token("</s>", special=True),
    }
    config = {"added_tokens_decoder": decoder, "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    folder = _beside(tmp_path / "t", tokenizer_file, tokenizer_config=config, added_tokens={"radiograph": size + 4})
    loaded = Tokenizer.load(folder)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (1, 2, size + 1, size + 5)
    text = "a radiograph <loc12> of <loc1>it"
    ids, offsets = loaded.encode(text)
    parts = [tokenizer.encode(part)[0] for part in ("a ", " ", " of ", "it")]
    assert ids == [*parts[0], size + 4, *parts[1], size + 3, *parts[2], size + 2, *parts[3]]
    for i in (size + 2, size + 3, size + 4):
        start, end = offsets[ids.index(i)]
        assert text[start:end] == {size + 2: "<loc1>", size + 3: "<loc12>", size + 4: "radiograph"}[i]
    assert loaded.decode(ids) == text
    # Special ones are put in by prompts alone: in a text they are characters, as </s> is.
    for special in ("<image>", "<pad>", "</s>"):
        assert loaded.encode(f"x{special}y") == tokenizer.encode(f"x{special}y")
    assert loaded.decode([size, *ids, size + 1]) == text
    assert pickle.loads(pickle.dumps(loaded)).encode(text) == (ids, offsets)
    loaded.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").encode(text) == (ids, offsets)


def test_roles_and_white_space_of_added_tokens(tmp_path, tokenizer_file, tokenizer):
    size = tokenizer.vocab_size
    more = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<tool>"]}
    added = {"<|im_end|>": size, "<tool>": size + 1}
    decoder = {str(size + 2): _token("#", lstrip=True, rstrip=True), str(size + 3): _token("ab", single_word=True)}
    config = {"added_tokens_decoder": decoder}
    folder = _beside(
        tmp_path / "t", tokenizer_file, special_tokens_map=more, added_tokens=added, tokenizer_config=config
    )
    loaded = Tokenizer.load(folder)
    assert loaded.eos_id == size
    assert loaded.is_special(size)
    assert loaded.is_special(size + 1)
    assert loaded.encode("x<|im_end|> <tool>") == tokenizer.encode("x<|im_end|> <tool>")
    ids, offsets = loaded.encode("a  # b ab cab")
    assert ids[1:2] == [size + 2]
    assert offsets[1] == (1, 5)
    assert ids.count(size + 3) == 1


def test_the_tokenizer_json_beside_a_model_stays_with_it(tmp_path, tokenizer_file):
    folder = _beside(tmp_path / "t", tokenizer_file, tokenizer={"model": "theirs"})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(folder).save(tmp_path / "copy")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<a>": 5}}, "add '<a>' as 5, which is "),
        ({"added_tokens": {"<a>": 900, "<b>": 900}}, "add '<b>' as 900, which is '<a>' already"),
        ({"added_tokens": {"<a>": 10**12}}, "are not texts with ids of 0 to"),
        ({"added_tokens": {"<a>": -1}}, "are not texts with ids of 0 to"),
        ({"added_tokens": {"": 900}}, "are not texts with ids of 0 to"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "are not texts with ids of 0 to"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "are not texts with ids of 0 to"),
        ({"tokenizer_config": {"eos_token": "<end>"}}, "names eos_token '<end>', which is not in its vocabulary"),
        ({"tokenizer_config": [1]}, "it is a list, not an object"),
    ],
)
def test_files_beside_a_model_that_do_not_fit_it(tmp_path, tokenizer_file, files, message):
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(_beside(tmp_path / "t", tokenizer_file, **files))
    assert "\n" not in str(caught.value)


def test_a_pointer_in_place_of_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"
    )
    with pytest.raises(UserError, match=r"tokenizer.model: is a Git LFS pointer .*; fetch it with git lfs pull"):
        Tokenizer.load(tmp_path)
