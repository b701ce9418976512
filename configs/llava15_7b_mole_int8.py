"""As configs/llava15_7b_mole.py on one device of 16 GiB, such as a TPU v5e: the frozen base in 8 bits, a row at a time.

The update is that of the 7B recipe; on several devices take `--mesh.data -1` and a smaller `--train.accumulation`. With
`--model.frozen_dtype nf4` the base takes half of that and is further from the model that was given.
"""

import dataclasses

from mole_jax import recipes
from mole_jax.config import Config, MeshConfig


def get_config() -> Config:
    config = recipes.config("llava15_7b_mole")
    return dataclasses.replace(
        config,
        name="llava15-7b-mole-int8",
        model=dataclasses.replace(config.model, frozen_dtype="int8", remat="full"),
        train=dataclasses.replace(config.train, accumulation=config.train.batch_rows),
        mesh=MeshConfig(data=1),
    )
