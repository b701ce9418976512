"""LLaVA-MoLE 13B: the 7B recipe on the larger base.

The paper has no 13B run; its 7B settings are kept, which is LLaVA-1.5's own practice between the two sizes. The base
is 26 GB in bf16, about 3.3 GB on each of 8 devices.
"""

import dataclasses

from mole_jax import recipes
from mole_jax.config import Config


def get_config() -> Config:
    config = recipes.config("llava15_7b_mole")
    return dataclasses.replace(
        config,
        name="llava15-13b-mole",
        model=dataclasses.replace(config.model, base="llava-hf/llava-1.5-13b-hf"),
        # Half the rows at a time: 40 layers of width 5120 keep more activations than 32 of 4096.
        train=dataclasses.replace(config.train, accumulation=2),
    )
