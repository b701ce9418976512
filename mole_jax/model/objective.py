"""The forward pass that training and evaluation share: from a batch to sums of losses and router statistics."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mole_jax.adapters.balance import balance_loss_sum, domain_loss_sum
from mole_jax.adapters.mixture import Hints
from mole_jax.config import Config
from mole_jax.model.llava import Llava
from mole_jax.model.loss import token_losses
from mole_jax.parameters import Tree

Arrays = dict[str, Array]
"""The device arrays of a `mole_jax.data.batch.Batch`, by field name."""


class Sums(NamedTuple):
    """What the pieces of a batch add up."""

    losses: Float[Array, " domains"]
    """Negative log-likelihood of the supervised tokens of each domain, in nats."""
    tokens: Float[Array, " domains"]
    """Supervised tokens of each domain."""
    rows: Int[Array, ""]
    """Rows with any supervised token."""
    right: Int[Array, ""]
    """Rows in which every supervised token is the likeliest one. Where a row is one example with one answer, greedy
    decoding would give just that answer."""
    balance: Float[Array, ""]
    """Balance loss summed over segments."""
    domain: Float[Array, ""]
    """Domain loss summed over segments."""
    entropy: Float[Array, " L"]
    """Router entropy of each layer summed over tokens, in nats."""
    use: Float[Array, "domains L E"]
    """Tokens of each domain that each layer sent to each expert."""


def hints(batch: Arrays) -> Hints:
    """Returns what routers may look at besides the tokens."""
    segments, mask = batch["segment_ids"], batch["loss_mask"]
    before = jnp.cumsum(mask, axis=1) - mask  # supervised targets of the row so far
    start = jnp.where(batch["positions"] == 0, before, 0)
    # Nothing is supervised twice, so the latest start of a segment is the largest one.
    first = before == jax.lax.cummax(start, axis=1)
    return Hints((segments > 0) & first, batch["domain_ids"])


@dataclasses.dataclass(frozen=True)
class Forward:
    """The forward pass that training and evaluation share."""

    config: Config
    graph: nnx.GraphDef
    domains: int

    def sums(self, params: Tree, frozen: Tree, batch: Arrays, key: Array | None) -> Sums:
        """Runs the model on (a piece of) a batch; `key` turns dropout on."""
        config, domains = self.config, self.domains
        model: Llava = nnx.merge(self.graph, params, frozen)
        hidden, use = model.hidden(
            batch["tokens"],
            batch["images"],
            batch["positions"],
            batch["segment_ids"],
            dtype=jnp.dtype(config.model.compute_dtype),
            segments=config.data.examples_per_row,
            hints=hints(batch),
            key=key,
            remat=config.model.remat,
            kernel=config.model.attention,
            sources=batch.get("sources"),
            weights=batch.get("weights"),
        )
        mask = batch["loss_mask"].astype(jnp.float32)
        losses, likeliest = token_losses(model.decoder, hidden, batch["targets"])
        # Masked rather than multiplied: a NaN at an unsupervised position must not reach the sum.
        losses = jnp.where(mask > 0, losses, 0.0)
        of_domain = jax.nn.one_hot(batch["domain_ids"], domains)
        answered = mask.any(axis=1)
        right = answered & (likeliest | (mask == 0)).all(axis=1)
        rows = answered.sum(), right.sum()
        by_domain = jnp.einsum("bs,bsm->m", losses, of_domain), jnp.einsum("bs,bsm->m", mask, of_domain)
        if use is None:
            return Sums(*by_domain, *rows, jnp.zeros(()), jnp.zeros(()), jnp.zeros(0), jnp.zeros((domains, 0, 0)))
        segments = jax.nn.one_hot(batch["segment_ids"] - 1, use.choices.shape[2])
        # All tokens of a segment are of one domain, so the largest id is that of the segment.
        ids = jnp.max(segments * batch["domain_ids"][..., None], axis=1).astype(jnp.int32)
        return Sums(
            *by_domain,
            *rows,
            balance=balance_loss_sum(use, config.adapter.balance_loss),
            domain=domain_loss_sum(use, ids),
            entropy=use.entropy.sum(axis=(1, 2)),
            use=jnp.einsum("lbke,bkm->mle", use.choices, jax.nn.one_hot(ids, domains)),
        )

    def evaluation_step(self, params: Tree, frozen: Tree, batch: Arrays) -> Sums:
        """Returns the sums of a held-out batch: no dropout, nothing changed."""
        return self.sums(params, frozen, batch, None)
