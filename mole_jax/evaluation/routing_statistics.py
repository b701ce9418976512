"""What a routing measurement holds: counts of routed tokens by domain, modality, layer and expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

MODALITIES = ("image", "prompt", "answer")


@dataclasses.dataclass(frozen=True)
class Routed:
    """Measurements on the held-out sets: D domains, K modalities (`MODALITIES`), L layers, E experts."""

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
    """Held-out loss in nats per answer token, the same as the evaluation's."""
    answer_tokens: Float[np.ndarray, " D"]
    skipped: Sequence[Mapping[str, int]]
    """Unused records of each domain, by reason."""
    knock_out: Float[np.ndarray, "E D"]
    """Increase of `losses` when one expert's delta is set to zero in all layers."""
    knock_out_by_layer: Float[np.ndarray, "L E D"] | None
    """The same for one layer at a time; None unless requested."""

    @property
    def by_domain(self) -> Float[np.ndarray, "D L E"]:
        """Tokens of all modalities. Each domain is scaled to one token, so that all domains weigh the same."""
        counts = self.tokens.sum(axis=1)
        return counts / counts[:, :1].sum(axis=-1, keepdims=True)

    @property
    def by_modality(self) -> Float[np.ndarray, "K L E"]:
        """The same over all domains, by modality."""
        whole = self.tokens[:, :, :1].sum(axis=(1, 3), keepdims=True)
        return (self.tokens / whole).sum(axis=0)

    @property
    def share(self) -> Float[np.ndarray, "L E"]:
        """Each expert's share of the tokens, averaged over domains."""
        return self.by_domain.mean(axis=0)

    @property
    def router_entropy(self) -> Float[np.ndarray, " L"]:
        """Mean entropy of the router's probabilities in nats, averaged over domains."""
        tokens = self.tokens[:, :, 0].sum(axis=(1, 2))
        return (self.entropy.sum(axis=1) / tokens[:, None]).mean(axis=0)
