"""Use of the experts by segment, and the losses made of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mole_jax.adapters.router import Routing


class RouterUse(NamedTuple):
    """Sums over the tokens of each class; in training a class is a segment, one example of a packed row."""

    probs: Float[Array, "*L B K E"]
    """Sum of router probabilities."""
    choices: Float[Array, "*L B K E"]
    """Tokens sent to each expert."""
    entropy: Float[Array, "*L B K"]
    """Sum of the entropies of the probabilities, in nats."""


def router_use(routing: Routing, classes: Float[Array, "B S K"]) -> RouterUse:
    """Sums what `routing` says over each class.

    `classes` is one-hot over K classes of tokens; padding is zero everywhere and so counts nowhere.
    """
    entropy = -jnp.sum(routing.probs * jnp.log(jnp.maximum(routing.probs, 1e-30)), axis=-1)
    return RouterUse(
        probs=jnp.einsum("bsk,bse->bke", classes, routing.probs),
        choices=jnp.einsum("bsk,bse->bke", classes, routing.choice),
        entropy=jnp.einsum("bsk,bs->bk", classes, entropy),
    )


def balance_loss_sum(use: RouterUse, kind: Literal["per_layer", "pooled"]) -> Float[Array, ""]:
    """Returns the balance loss summed over segments; divide by their number for the mean.

    Of one segment: ``sum_e c_e p_e`` with c_e the share of its tokens sent to e (no gradient) and p_e
    their mean probability (LLaVA-MoLE, arXiv 2401.16160); 1 / E when routing is uniform. `per_layer`
    averages that over layers; `pooled` takes c and p over all layers at once (released code), which
    cannot see one layer collapse. A sum over segments, so that the pieces of an accumulated batch add up.
    """
    probs, choices = use.probs, use.choices
    if kind == "pooled":
        probs, choices = probs.sum(axis=0, keepdims=True), choices.sum(axis=0, keepdims=True)
    tokens = jnp.maximum(choices.sum(axis=-1), 1.0)
    # The choice is an argmax: it carries no gradient of its own, so none needs to be stopped.
    per_segment = jnp.sum(choices * probs, axis=-1) / tokens**2
    return per_segment.mean(axis=0).sum()


def domain_loss_sum(use: RouterUse, domain_ids: Int[Array, "B K"]) -> Float[Array, ""]:
    """Returns, summed over segments, how little the routers tell the domains apart by.

    Of one segment of domain d: ``-log p_k`` averaged over layers, with k = d modulo E and p_k the segment's mean
    probability of expert k (ours; nothing in LLaVA-MoLE tells the router of domains).
    """
    tokens, experts = use.choices.sum(axis=-1), use.probs.shape[-1]
    wanted = jnp.sum(use.probs * jax.nn.one_hot(domain_ids % experts, experts), axis=-1)
    surprise = -jnp.log(jnp.maximum(wanted, 1e-6) / jnp.maximum(tokens, 1.0))
    return jnp.where(tokens > 0, surprise, 0.0).mean(axis=0).sum()
