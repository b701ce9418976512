"""Text while it comes: whole characters, no half of a stop text, and the same whatever the pieces."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_jax.serving.text import Answer
from mole_jax.tokenizer import Tokenizer
from tests.tiny import TOKENIZER


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory) -> Tokenizer:
    """A token for every byte, as the byte-level tokenizers of GPT-2 and Llama 3 have."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    file = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    tokenizer.save(str(file))
    return Tokenizer.load(file)


def streamed(tokenizer, tokens, stop, cuts):
    """Returns the answer and the pieces it came in; `cuts` are the lengths of the pieces, the last one is the rest."""
    answer, pieces = Answer(tokenizer, stop), []
    while tokens and cuts and not answer.finished:
        pieces.append(answer.push(tokens[: cuts[0]]))
        tokens, cuts = tokens[cuts[0] :], cuts[1:]
    pieces.append(answer.push(tokens, last=True))
    return answer, pieces


TEXTS = st.text(alphabet="ab \n#é漢😀", max_size=12)
CUTS = st.lists(st.integers(1, 3), max_size=40)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, cuts=CUTS, stop=st.sampled_from([(), ("##",), ("#a", "b\n"), ("😀#",)]))
def test_any_pieces_join_to_the_text_before_the_stop(by_bytes, text, cuts, stop):
    tokens, _ = by_bytes.encode(text)
    answer, pieces = streamed(by_bytes, tokens, stop, cuts)
    visible = text.lstrip()
    expected = min((visible.split(one)[0] for one in stop), key=len, default=visible).rstrip()
    assert "".join(pieces) == answer.text == expected
    assert answer.finished


@pytest.mark.parametrize("folder", [TOKENIZER, "llama"])
def test_sentencepiece_keeps_its_spaces_and_its_bytes_together(folder, request):
    """Pieces of one token each; bytes are the fallback for what the vocabulary lacks."""
    if folder == "llama":
        folder = request.getfixturevalue("shared") / "models" / "llama_tokenizer"
        if not folder.exists():
            pytest.skip("needs the Llama tokenizer in 'shared'")
    tokenizer = Tokenizer.load(folder)
    tokens, _ = tokenizer.encode("a red box, 漢😀 left")
    whole = tokenizer.decode(tokens)
    answer, pieces = streamed(tokenizer, tokens, (), [1] * len(tokens))
    assert "".join(pieces) == answer.text == whole.strip()
    assert all("\N{REPLACEMENT CHARACTER}" not in piece or "\N{REPLACEMENT CHARACTER}" in whole for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 3


def test_half_a_character_is_never_told(by_bytes):
    tokens, _ = by_bytes.encode("ok 漢")
    answer, pieces = streamed(by_bytes, tokens[:-1], (), [1] * len(tokens))
    assert ("".join(pieces), answer.text, answer.tokens) == ("ok", "ok", tokens[:-1])


def test_nothing_comes_after_the_end(by_bytes):
    answer = Answer(by_bytes, ("#",))
    assert (answer.push(by_bytes.encode("yes#no")[0]), answer.finished) == ("yes", True)
    assert (answer.push(by_bytes.encode("more")[0]), answer.text) == ("", "yes")
