"""What the tests of the data share: outside values, and a tokenizer trained here."""

from __future__ import annotations

import pathlib

import pytest
import sentencepiece

from mole_jax.data.tokenizer import Tokenizer

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What colour is the square? ASSISTANT: It is red.",
    "USER: How many circles are there? ASSISTANT: There are three small circles in the picture.",
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Ein Würfel, zwei Kreise und drei Dreiecke liegen auf dem Tisch.",
)


@pytest.fixture(scope="session")
def reference():
    """Returns a function from a name under goldens/ to its path; it skips where that is not there."""

    def find(name: str) -> pathlib.Path:
        for root in (REPOSITORY / "tests" / "goldens", REPOSITORY.parent / "shared" / "goldens"):
            if (root / name).exists():
                return root / name
        pytest.skip(f"reference values {name} are neither in tests/goldens nor in ../shared/goldens")

    return find


@pytest.fixture(scope="session")
def llama_tokenizer() -> Tokenizer:
    """The Llama/Vicuna tokenizer."""
    path = REPOSITORY.parent / "shared" / "models" / "llama_tokenizer"
    if not path.exists():
        pytest.skip("the Llama tokenizer is not in ../shared/models/llama_tokenizer")
    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> pathlib.Path:
    """A small sentencepiece model with byte fallback, as Llama's is built."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file) -> Tokenizer:
    return Tokenizer.load(tokenizer_file)
