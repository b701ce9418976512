"""The FLOPs of a training step against a count by hand."""

from __future__ import annotations

import dataclasses

import pytest

from mole_jax.model.architecture import PRESETS
from mole_jax.model.spec import ModelSpec
from mole_jax.training.flops import step_flops
from tests import tiny


@pytest.mark.parametrize("tower", [False, True])
def test_a_tile_more_costs_its_matrices_and_its_attention(tmp_path, tower):
    """2N a token forward and 4N a token through a trained tower, scores and values of all pairs of its tokens alike."""
    config, arch = tiny.config(tmp_path, data={"domains": ()}), PRESETS["tiny"]
    trainable = ("adapters", "router", "projector", *(("vision",) if tower else ()))
    declarations = ModelSpec.of(arch, config.adapter).declarations

    def flops(tiles: int) -> float:
        data = dataclasses.replace(config.data, tiles_per_row=tiles)
        return step_flops(dataclasses.replace(config, data=data), arch, declarations, trainable)

    # 28 pixels in patches of 14: 4 and the class token; 2 layers of width 32 and 64; 4 features to a width of 32.
    layer = 4 * 32 * 32 + 2 * 32 * 64
    matrices = 2 * 5 * (2 * layer + 14 * 14 * 3 * 32)
    attention = 2 * 2 * 2 * 5 * 5 * 32
    projector = 3 * 2 * 4 * (32 * 32 + 32 * 32)  # trained: forward, and back to its input and its matrix
    expected = config.train.batch_rows * ((3 if tower else 1) * (matrices + attention) + projector)
    assert flops(3) - flops(2) == expected
