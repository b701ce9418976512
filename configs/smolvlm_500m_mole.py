"""SmolVLM 500M: pictures of up to 17 tiles, of which a decoder sees only 64 positions each.

A row at a time on one device; on N devices of data give `--train.accumulation` 32 / N. The largest picture (4 x 4 tiles
and the whole of it) takes about 1,200 positions with its marks, so that a row of 2,048 holds it and its text.
"""

import dataclasses

from mole_jax import recipes
from mole_jax.config import Config, MeshConfig


def get_config() -> Config:
    config = recipes.config("llava15_7b_mole")
    return dataclasses.replace(
        config,
        name="smolvlm-500m-mole",
        model=dataclasses.replace(config.model, base="HuggingFaceTB/SmolVLM-500M-Instruct"),
        data=dataclasses.replace(config.data, tiles_per_row=17),
        train=dataclasses.replace(config.train, accumulation=32),
        mesh=MeshConfig(data=-1),
    )
