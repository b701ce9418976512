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
from mole_jax.config import Config, LossAverage
from mole_jax.model.llava import Llava
from mole_jax.model.loss import token_losses
from mole_jax.parameters import Tree

Arrays = dict[str, Array]
"""The device arrays of a `mole_jax.data.batch.Batch`, by field name."""


class Sums(NamedTuple):
    """What the pieces of a batch add up."""

    losses: Float[Array, " domains"]
    """Negative log-likelihood of the supervised tokens of each domain, in nats: its sum or, by example, the sum over
    examples of the mean over the example's tokens."""
    units: Float[Array, " domains"]
    """What `losses` are divided by for their mean: supervised tokens or, by example, examples that have any."""
    tokens: Float[Array, " domains"]
    """Supervised tokens of each domain."""
    rows: Int[Array, ""]
    """Rows with any supervised token."""
    right: Int[Array, ""]
    """Rows in which every supervised token is the likeliest one. Where a row is one example with one answer, greedy
    decoding would give just that answer."""
    balance: Float[Array, ""]
    """Balance loss summed over segments, each of weight 1 however the tokens' losses are averaged."""
    domain: Float[Array, ""]
    """Domain loss summed over segments, likewise."""
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


def tokens_of_examples(
    mask: Float[Array, "B S"], segment_ids: Int[Array, "B S"], segments: int
) -> Float[Array, "B segments"]:
    """Returns the supervised tokens of each example of a row; of at most so many `segments`, 0 where there is none."""
    return (jax.nn.one_hot(segment_ids - 1, segments) * mask[..., None]).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Forward:
    """The forward pass that training and evaluation share."""

    config: Config
    graph: nnx.GraphDef
    domains: int

    def sums(
        self, params: Tree, frozen: Tree, batch: Arrays, key: Array | None, average: LossAverage = "token"
    ) -> Sums:
        """Runs the model on (a piece of) a batch; `key` turns dropout on, `average` says what each loss weighs."""
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
        tokens = units = jnp.einsum("bs,bsm->m", mask, of_domain)
        if average == "example":
            counts = tokens_of_examples(mask, batch["segment_ids"], config.data.examples_per_row)
            # No product of matrices, which some devices round: the weights of an example must add up to 1.
            own = jax.nn.one_hot(batch["segment_ids"] - 1, counts.shape[1]) * counts[:, None]
            losses = losses / jnp.maximum(own.sum(axis=-1), 1)
            # All tokens of an example are of one domain; its first position, 0 there alone, stands for it.
            begins = (batch["positions"] == 0) & (own.sum(axis=-1) > 0)
            units = (begins[..., None] * of_domain).sum(axis=(0, 1))
        answered = mask.any(axis=1)
        right = answered & (likeliest | (mask == 0)).all(axis=1)
        rows = answered.sum(), right.sum()
        by_domain = jnp.einsum("bs,bsm->m", losses, of_domain), units, tokens
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
        """Returns the sums of a held-out batch: no dropout, nothing changed, by token however training averages."""
        return self.sums(params, frozen, batch, None)
