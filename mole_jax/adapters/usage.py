"""Statistics of expert use from counts of routed tokens: shares, entropy, specialisation, dead and collapsed experts.

NumPy on the host; training, evaluation and studies all use these functions.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

DEAD = 0.01
"""An expert is dead in a layer that sends it less than this part of an equal share (1 / E of the tokens)."""
COLLAPSED = 0.95
"""A layer has collapsed when one expert gets more than this share of its tokens."""


def shares(counts: Float[np.ndarray, "*C E"]) -> Float[np.ndarray, "*C E"]:
    """Returns the distribution over experts; NaN where there is no token."""
    total = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def entropy(probabilities: Float[np.ndarray, "*C E"]) -> Float[np.ndarray, "*C"]:
    """Returns the entropy of each distribution, in nats."""
    logs = np.log(probabilities, out=np.zeros(probabilities.shape), where=probabilities > 0)
    return 0.0 - (probabilities * logs).sum(axis=-1)  # -sum would give -0.0


def mutual_information(counts: Float[np.ndarray, "C *L E"]) -> Float[np.ndarray, "*L"]:
    """Returns the mutual information of expert and class in nats, with all classes weighted equally.

    This is the entropy of the mean distribution over experts minus the mean of the classes' entropies. It lies between
    0 (the class says nothing about the expert) and `information_bound`. Classes without tokens are left out; the
    result is NaN when no class has any.
    """
    present = shares(counts[_seen(counts)])
    if not len(present):
        return np.full(counts.shape[1:-1], np.nan)
    # Rounding can give -1e-17 instead of zero.
    return np.maximum(0.0, entropy(present.mean(axis=0)) - entropy(present).mean(axis=0))


def information_bound(counts: Float[np.ndarray, "C *L E"]) -> float:
    """Returns the largest possible `mutual_information` in nats: the smaller of log E and log of the class count."""
    classes = int(_seen(counts).sum())
    return min(math.log(counts.shape[-1]), math.log(classes)) if classes else 0.0


def dead_experts(share: Float[np.ndarray, "L E"]) -> list[tuple[int, int]]:
    """Returns (layer, expert) of each expert whose share of the tokens is below `DEAD` / E."""
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(share < DEAD / share.shape[-1])]


def collapsed_layers(share: Float[np.ndarray, "L E"]) -> list[tuple[int, int]]:
    """Returns (layer, expert) of each layer in which one expert gets more than `COLLAPSED` of the tokens.

    A layer with a single expert cannot collapse.
    """
    if share.shape[-1] == 1:
        return []
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(share > COLLAPSED)]


def _seen(counts: Float[np.ndarray, "C *L E"]) -> np.ndarray:
    return counts.reshape(len(counts), -1).sum(axis=-1) > 0
