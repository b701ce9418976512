"""Rotary position embedding (Su et al. 2021) in the half-split layout of HF Llama checkpoints."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mole_jax.model.architecture import DecoderArchitecture


def frequencies(arch: DecoderArchitecture) -> np.ndarray:
    """Returns the C/2 angular frequencies in radians per position, with Llama-3 scaling if the architecture has it."""
    exponents = np.arange(0, arch.head_dim, 2, dtype=np.float64) / arch.head_dim
    base = arch.rope_theta**-exponents
    scaling = arch.rope_scaling
    if scaling is None:
        return base
    wavelength = 2 * math.pi / base
    # Long waves are slowed by `factor`, short ones kept, those in between interpolated (transformers, "llama3").
    smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return base * (smooth + (1 - smooth) / scaling.factor)


def rotations(positions: Int[Array, "B S"], arch: DecoderArchitecture) -> Float[Array, "2 B 1 S C/2"]:
    """Returns the cosine and sine of each position's angles, in float32."""
    angles = positions.astype(jnp.float32)[:, None, :, None] * jnp.asarray(frequencies(arch), jnp.float32)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "B H S C"], rotation: Float[Array, "2 B 1 S C/2"]) -> Float[Array, "B H S C"]:
    """Rotates the pairs (i, i + C/2) of every head."""
    cos, sin = rotation.astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
