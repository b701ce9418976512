"""LoRA experts of one projection, stacked so that routing is a mask in rank space."""

from __future__ import annotations

from jaxtyping import Array, Float, PRNGKeyArray

from mole_jax.adapters.lora import LoRA
from mole_jax.parameters import Declare


class Experts(LoRA):
    """E LoRAs of rank R as one of rank E*R: ``delta(x) = (alpha / R) * (gates . (dropout(x) A)) B``.

    Columns ``e*R:(e+1)*R`` of A (D_in, E*R) and the same rows of B (E*R, D_out) are expert e. Zeroing
    the rank-space blocks of the experts that are not chosen gives the exact top-1 mixture with static
    shapes and no token dropped; gates that are probabilities give the dense mixture. The expert of the
    down projection acts on the hidden activations of the same token (released LLaVA-MoLE block).
    """

    def __init__(
        self,
        declare: Declare,
        d_in: int,
        d_out: int,
        axes: tuple[str, str],
        *,
        experts: int,
        rank: int,
        alpha: float,
        dropout: float,
    ):
        """`rank` is that of one expert; for the rest see `LoRA`."""
        super().__init__(declare, d_in, d_out, axes, rank=experts * rank, alpha=experts * alpha, dropout=dropout)
        self.experts = experts

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "B S I"], gates: Float[Array, "B S E"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B S O"]:
        """Returns the gated sum of the experts' deltas in the type of `x`."""
        h = self.down(x, key)
        blocks = h.reshape(*h.shape[:-1], self.experts, -1) * gates[..., None].astype(h.dtype)
        return self.up(blocks.reshape(h.shape))
