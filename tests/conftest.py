"""Fixtures of the whole suite, and the environment that has to be set before jax is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Sharding is tested on eight simulated devices. A GPU run sets JAX_PLATFORMS itself (JAX_PLATFORMS=cuda pytest -m gpu).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    _flags += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in _flags:
    # Most of the suite's time is compiling programs that run once; unoptimised ones compile in less than half of it.
    _flags += " --xla_backend_optimization_level=0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker per core is the rule, so a pool of threads in each would only make them wait for each other.
    if "xla_cpu_multi_thread_eigen" not in _flags:
        _flags += " --xla_cpu_multi_thread_eigen=false"
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, "1")
os.environ["XLA_FLAGS"] = _flags.strip()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What several tests, or the processes that they start, compile is compiled once a session.
    _cache = tempfile.mkdtemp(prefix="mole_jax_tests_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# No test may reach for the network; one that tries fails at once instead of waiting for a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_REPOSITORY = Path(__file__).resolve().parents[1]
_SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What colour is the square? ASSISTANT: It is red.",
    "USER: How many circles are there? ASSISTANT: There are three small circles in the picture.",
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Ein Würfel, zwei Kreise und drei Dreiecke liegen auf dem Tisch.",
)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of the reference values kept with the tests (goldens/README.md)."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder ``shared`` beside the checkout: real data, photographs and the Llama tokenizer, not kept in git."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder 'shared' beside the checkout (real data, photographs and tokenizer; not in git)")
    return folder


@pytest.fixture(scope="session")
def reference():
    """Returns a function from a name under goldens/ to its path; it skips where that is not there."""

    def find(name: str) -> Path:
        for root in (_REPOSITORY / "tests" / "goldens", _REPOSITORY.parent / "shared" / "goldens"):
            if (root / name).exists():
                return root / name
        pytest.skip(f"reference values {name} are neither in tests/goldens nor in ../shared/goldens")

    return find


@pytest.fixture(scope="session")
def llama_tokenizer():
    """The Llama/Vicuna tokenizer."""
    path = _REPOSITORY.parent / "shared" / "models" / "llama_tokenizer"
    if not path.exists():
        pytest.skip("the Llama tokenizer is not in ../shared/models/llama_tokenizer")
    from mole_jax.tokenizer import Tokenizer

    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A small sentencepiece model with byte fallback, as Llama's is built."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 20),
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
def tokenizer(tokenizer_file):
    from mole_jax.tokenizer import Tokenizer

    return Tokenizer.load(tokenizer_file)
