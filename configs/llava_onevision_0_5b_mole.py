"""LLaVA-OneVision 0.5B: a MoLE that fits one card of 24 GB, or one TPU v5e.

A row at a time on one device; on N devices of data give `--train.accumulation` 16 / N. A picture is a base view and up
to four tiles (`max_tiles`; the base itself goes to 36), at most 3,753 positions with the newlines, which leave about
340 for text.
"""

import dataclasses

from mole_jax import recipes
from mole_jax.config import Config, MeshConfig


def get_config() -> Config:
    config = recipes.config("llava15_7b_mole")
    return dataclasses.replace(
        config,
        name="llava-onevision-0.5b-mole",
        model=dataclasses.replace(config.model, base="llava-hf/llava-onevision-qwen2-0.5b-ov-hf"),
        data=dataclasses.replace(config.data, sequence_length=4096, tiles_per_row=5, max_tiles=5),
        train=dataclasses.replace(config.train, batch_rows=16, accumulation=16),
        mesh=MeshConfig(data=-1),
    )
