"""InternVL3 1B: pictures of up to 13 tiles of 256 positions each.

A row at a time on one device; on N devices of data give `--train.accumulation` 16 / N. The largest picture (12 tiles
and a thumbnail) takes 3,328 positions, so that a row of 4,096 holds it and its text.
"""

import dataclasses

from mole_jax import recipes
from mole_jax.config import Config, MeshConfig


def get_config() -> Config:
    config = recipes.config("llava15_7b_mole")
    return dataclasses.replace(
        config,
        name="internvl3-1b-mole",
        model=dataclasses.replace(config.model, base="OpenGVLab/InternVL3-1B-hf"),
        data=dataclasses.replace(config.data, sequence_length=4096, tiles_per_row=13),
        train=dataclasses.replace(config.train, batch_rows=16, accumulation=16),
        mesh=MeshConfig(data=-1),
    )
