"""What `benchmarks.peers` measures: models, batches and questions by size."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from mole_jax.config import AdapterConfig, Dtype, Remat
from mole_jax.model.architecture import DecoderArchitecture, LlavaArchitecture, preset
from mole_jax.serving.sampler import Prompt

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a model, its adapters' rank, a batch, a question, and how both libraries keep activations."""

    arch: LlavaArchitecture
    rows: int
    length: int
    """Tokens of a row; examples are packed into it."""
    text: tuple[int, int]
    """Fewest and most text tokens of an example, besides its picture; (0, 0): an example fills its row."""
    question: int
    """Text tokens of a prompt for decoding, besides its picture."""
    answer: int
    """Tokens decoded."""
    dtype: Dtype
    remat: Remat
    """Ours. The peer checkpoints its layers unless it is none."""
    rank: int = 32
    experts: int = 3

    def adapter(self, kind: str) -> AdapterConfig:
        """Returns the adapters of that kind; without dropout, so that results can be compared."""
        return AdapterConfig(kind=kind, rank=self.rank, alpha=2.0 * self.rank, dropout=0.0, experts=self.experts)  # pyright: ignore[reportArgumentType]


def batch_of(case: Case, seed: int = 0) -> Arrays:
    """Returns a packed batch of random text and pictures, one picture at the head of each example."""
    rng, arch, span = np.random.default_rng(seed), case.arch, case.arch.image_span
    shape = (case.rows, case.length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    counts = [0] * case.rows
    for row in range(case.rows):
        start = 0
        while start < case.length:
            text = int(rng.integers(*case.text)) if any(case.text) else case.length - 1 - span
            end = start + 1 + span + text
            if end > case.length:
                break
            counts[row] += 1
            tokens[row, start:end] = rng.integers(3, arch.image_token_id, end - start)
            tokens[row, start + 1 : start + 1 + span] = arch.image_token_id
            segments[row, start:end], positions[row, start:end] = counts[row], np.arange(end - start)
            start = end
        positions[row, start:] = np.arange(case.length - start)
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0) & (tokens[:, 1:] != arch.image_token_id)
    mask = np.pad(follows, ((0, 0), (0, 1))).astype(np.int32)
    side = arch.vision.image_size
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_mask": mask,
        "positions": positions,
        "segment_ids": segments,
        "domain_ids": np.zeros(shape, np.int32),
        "images": rng.integers(0, 256, (case.rows, max(counts), side, side, 3)).astype(np.uint8),
    }


def prompts_of(case: Case, rows: int, seed: int = 0) -> list[Prompt]:
    """Returns questions of one length about a picture each."""
    rng, arch = np.random.default_rng(seed), case.arch
    side = arch.vision.image_size
    prompts = []
    for _ in range(rows):
        tokens = rng.integers(3, arch.image_token_id, 1 + arch.image_span + case.question).astype(np.int32)
        tokens[1 : 1 + arch.image_span] = arch.image_token_id
        prompts.append(Prompt(tokens, rng.integers(0, 256, (1, side, side, 3)).astype(np.uint8)))
    return prompts


class Sizes(NamedTuple):
    """What a size stands for, besides its `Case`."""

    block_tokens: int
    attention: tuple[int, int, int, int]
    """Rows, length, heads and their width."""
    product: int
    """Side of the matrices of the ceiling."""
    copy: int
    """Numbers copied."""


SIZES = {
    "tiny": Sizes(32, (1, 32, 2, 8), 64, 1 << 10),
    "small": Sizes(2048, (4, 512, 8, 64), 2048, 1 << 26),
    "7b": Sizes(8192, (4, 2048, 32, 128), 8192, 1 << 30),
}


def case_of(size: str) -> Case:
    """Returns the model and the batches of a size.

    small is the laptop's: 8 layers of 512, the Llama tokenizer's vocabulary, rows of one example. 7b is LLaVA-1.5's
    7B, with rows of 2,048 tokens that hold examples of a picture (576 tokens) and 32 to 700 tokens of text.
    """
    if size == "tiny":
        return Case(preset("tiny"), 2, 48, (4, 16), 8, 6, "float32", "none", rank=4)
    if size == "7b":
        return Case(preset("vicuna-7b"), 4, 2048, (32, 700), 48, 128, "bfloat16", "attention")
    decoder = DecoderArchitecture(
        vocab=32064, width=512, mlp_width=1376, layers=8, heads=8, kv_heads=8, head_dim=64, max_position=1024
    )
    arch = LlavaArchitecture(preset("small").vision, decoder, image_token_id=32000)
    return Case(arch, 4, 512, (0, 0), 48, 64, "float32", "none")
