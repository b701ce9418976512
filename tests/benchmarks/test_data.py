"""The benchmark of the data runs from end to end at a tiny size, and its page has every candidate."""

from __future__ import annotations

import math

import pytest

from benchmarks import data
from mole_jax.tokenizer import Tokenizer
from tests import tiny


@pytest.mark.slow
def test_every_container_is_measured_and_shown(monkeypatch):
    monkeypatch.setattr(data, "WORKERS", (0,))
    result = data.result_of(Tokenizer.load(tiny.TOKENIZER), records=40, rounds=1, seconds=0.1, epochs=1)
    names = [row["container"] for row in result["reading"]]
    assert names == ["JSON and files", "parquet", "ArrayRecord", "TFDS"]
    tokens = [row["tokens/example"] for row in result["reading"]]
    assert max(tokens) < 1.2 * min(tokens), "they read the same records, but for how many they come to"
    text = data.page(result)
    assert all(f"| {name} | 0 |" in text for name in names)
    assert [row["batches"] for row in result["epoch"]] == [result["epoch"][0]["batches"]] * 2
    # 16 x 989e12 / 2 FLOP/s over the FLOPs of a token, told in docs/pods.md, over the tokens of an example.
    assert math.isclose(result["need"]["tokens/s"], 989e12 / 2 / (245.0e12 / 8192))
