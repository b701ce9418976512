"""LLaVA-NeXT 7B (1.6, Mistral): the 7B recipe on a base that sees a picture in up to five tiles.

The update is that of the 7B recipe. A picture takes three to five tiles with its base view. A row of 4,096 holds the
largest, of up to 2,928 positions, and its text, or two of three tiles.
"""

import dataclasses

from mole_jax import recipes
from mole_jax.config import Config


def get_config() -> Config:
    config = recipes.config("llava15_7b_mole")
    return dataclasses.replace(
        config,
        name="llava-next-7b-mole",
        # A row of twice the length keeps less of each layer on 16 GiB (docs/pods.md).
        model=dataclasses.replace(config.model, base="llava-hf/llava-v1.6-mistral-7b-hf", remat="attention"),
        data=dataclasses.replace(config.data, sequence_length=4096, tiles_per_row=6),
        # Half the rows, each of twice the length.
        train=dataclasses.replace(config.train, batch_rows=16, accumulation=2),
    )
