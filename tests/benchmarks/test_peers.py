"""The benchmark with peers: its batches, what it says without torch, and (marked torch) all of it at a tiny size."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peer_cases import batch_of, case_of, prompts_of
from benchmarks.peers import COLUMNS, SECTIONS

ROOT = Path(__file__).parents[2]


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "benchmarks.peers", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_examples_are_packed_with_a_picture_at_their_head():
    case = case_of("tiny")
    batch, span, image = batch_of(case), case.arch.image_span, case.arch.image_token_id
    tokens, segments, positions = (batch[name] for name in ("tokens", "segment_ids", "positions"))
    assert segments.max() > 1
    for row in range(case.rows):
        for segment in range(1, segments[row].max() + 1):
            own = segments[row] == segment
            assert (positions[row, own] == np.arange(own.sum())).all()
            assert (tokens[row, own][1 : 1 + span] == image).all()
            assert (tokens[row, own] == image).sum() == span
            assert case.text[0] <= own.sum() - 1 - span < case.text[1]
            # Its last token predicts nothing, and no token of a picture is predicted.
            assert batch["loss_mask"][row, own][:span].sum() == 0
            assert batch["loss_mask"][row, own][span:].tolist() == [1] * (own.sum() - 1 - span) + [0]
    assert batch["loss_mask"][segments == 0].sum() == 0
    supervised = batch["loss_mask"][:, :-1] == 1
    assert (batch["targets"][:, :-1] == tokens[:, 1:])[supervised].all()


def test_the_7b_is_llavas_with_rows_that_are_nearly_full():
    case = case_of("7b")
    assert (case.arch.decoder.layers, case.arch.image_span, case.dtype) == (32, 576, "bfloat16")
    assert (prompts_of(case, 2)[0].tokens == case.arch.image_token_id).sum() == 576
    small = case_of("small")
    assert (batch_of(small)["segment_ids"] == 1).all()


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="this environment has PEFT")
def test_without_torch_it_says_what_to_install():
    done = run(sys.executable, "--size", "tiny")
    assert done.returncode == 2
    assert "peft is not installed" in done.stderr
    assert "docs/peers.md" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.torch
def test_everything_is_compared_and_timed_at_a_tiny_size(tmp_path):
    python = os.environ.get("MOLE_JAX_TORCH_PYTHON")
    if not python:
        pytest.skip("MOLE_JAX_TORCH_PYTHON names no interpreter that has torch, transformers 5 and peft")
    done = run(python, "--size", "tiny", "--rounds", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    # Of both models, answers of both batches, the block in both forms, and attention forward and backward.
    for what in ("logits", "loss", "gradient of lora_A", "batch 8: answers' tokens that differ"):
        assert result["distance"][what] < 1e-5
    assert any("gradient of down/b" in what for what in result["distance"])
    assert any("forward and backward: k" in what for what in result["distance"])
    for name in SECTIONS:
        assert result[name]
        for row in result[name]:
            assert row["low"] <= row["ratio"] <= row["high"]
            assert set(row) <= {"ratio", "low", "high", "what", *COLUMNS}
    text = file.with_suffix(".md").read_text()
    assert text.count("| **") == sum(len(result[name]) for name in SECTIONS)
    assert str(tmp_path) not in text + file.read_text()
