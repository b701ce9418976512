"""What counts of routed tokens say: entropy, specialisation, dead and collapsed experts. NumPy alone, on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

DEAD = 0.01
"""An expert is dead in a layer where it gets less than this part of an equal share, 1 / E of the tokens."""
COLLAPSED = 0.95
"""A layer has collapsed where one expert gets more than this share of the tokens."""

MODALITIES = ("image", "prompt", "answer")


@dataclasses.dataclass(frozen=True)
class Routed:
    """What was measured on the held-out sets: D domains, K modalities (`MODALITIES`), L layers, E experts."""

    checkpoint: str
    step: int
    router_gradient: str
    domains: Sequence[str]
    tokens: Float[np.ndarray, "D K L E"]
    """Tokens by their most probable expert."""
    probabilities: Float[np.ndarray, "D K L E"]
    """Sum of the router's probabilities over the tokens."""
    entropy: Float[np.ndarray, "D K L"]
    """Sum of the router's entropies over the tokens, in nats."""
    losses: Float[np.ndarray, " D"]
    """Held-out loss in nats per answer token, as the evaluation has it."""
    answer_tokens: Float[np.ndarray, " D"]
    skipped: Sequence[Mapping[str, int]]
    """Records of each domain that were not used, by reason."""
    knock_out: Float[np.ndarray, "E D"]
    """What is added to `losses` when one expert's delta is zero in all layers."""
    knock_out_by_layer: Float[np.ndarray, "L E D"] | None
    """The same for one layer at a time, where it was asked for."""

    @property
    def by_domain(self) -> Float[np.ndarray, "D L E"]:
        """Tokens of all modalities, every domain scaled to one token: a small held-out set counts like a large one."""
        counts = self.tokens.sum(axis=1)
        return counts / counts[:, :1].sum(axis=-1, keepdims=True)

    @property
    def by_modality(self) -> Float[np.ndarray, "K L E"]:
        """The same of all domains, by modality."""
        whole = self.tokens[:, :, :1].sum(axis=(1, 3), keepdims=True)
        return (self.tokens / whole).sum(axis=0)

    @property
    def share(self) -> Float[np.ndarray, "L E"]:
        """Share of the tokens that each expert gets, the mean over domains."""
        return self.by_domain.mean(axis=0)

    @property
    def router_entropy(self) -> Float[np.ndarray, " L"]:
        """Mean entropy of the router's probabilities, in nats, the mean over domains."""
        tokens = self.tokens[:, :, 0].sum(axis=(1, 2))
        return (self.entropy.sum(axis=1) / tokens[:, None]).mean(axis=0)


def shares(counts: Float[np.ndarray, "*C E"]) -> Float[np.ndarray, "*C E"]:
    """Returns the distribution over experts; NaN where there is no token."""
    total = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def entropy(probabilities: Float[np.ndarray, "*C E"]) -> Float[np.ndarray, "*C"]:
    """Returns the entropy of each distribution, in nats."""
    logs = np.log(probabilities, out=np.zeros(probabilities.shape), where=probabilities > 0)
    return 0.0 - (probabilities * logs).sum(axis=-1)  # not -sum, which may be -0.0


def mutual_information(counts: Float[np.ndarray, "C *L E"]) -> Float[np.ndarray, "*L"]:
    """Returns the mutual information of expert and class, in nats, every class taken as equally frequent.

    It is the entropy of the mean distribution over experts less the mean of the entropies, and lies between 0 (the
    class says nothing about the expert) and `information_bound`. Classes without a token are left out; without any
    class it is NaN.
    """
    present = shares(counts[_seen(counts)])
    if not len(present):
        return np.full(counts.shape[1:-1], np.nan)
    # Rounding may leave -1e-17 where nothing is learnt.
    return np.maximum(0.0, entropy(present.mean(axis=0)) - entropy(present).mean(axis=0))


def information_bound(counts: Float[np.ndarray, "C *L E"]) -> float:
    """Returns the most that `mutual_information` can be, in nats: the smaller of log E and log of the classes."""
    classes = int(_seen(counts).sum())
    return min(math.log(counts.shape[-1]), math.log(classes)) if classes else 0.0


def dead_experts(share: Float[np.ndarray, "L E"]) -> list[tuple[int, int]]:
    """Returns (layer, expert) of each expert whose share of the tokens is under `DEAD` / E."""
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(share < DEAD / share.shape[-1])]


def collapsed_layers(share: Float[np.ndarray, "L E"]) -> list[tuple[int, int]]:
    """Returns (layer, expert) of each layer in which one expert has over `COLLAPSED` of the tokens.

    None of a single expert, which has nothing to share.
    """
    if share.shape[-1] == 1:
        return []
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(share > COLLAPSED)]


def _seen(counts: Float[np.ndarray, "C *L E"]) -> np.ndarray:
    return counts.reshape(len(counts), -1).sum(axis=-1) > 0
