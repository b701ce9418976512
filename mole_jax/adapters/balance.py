"""Use of the experts by segment, and the losses computed from it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mole_jax.adapters.router import Routing


class RouterUse(NamedTuple):
    """Sums over the tokens of each class. In training a class is a segment: one example of a packed row."""

    probs: Float[Array, "*L B K E"]
    """Sum of router probabilities."""
    choices: Float[Array, "*L B K E"]
    """Tokens sent to each expert."""
    entropy: Float[Array, "*L B K"]
    """Sum of the entropies of the probabilities, in nats."""


def router_use(routing: Routing, classes: Float[Array, "B S K"]) -> RouterUse:
    """Sums `routing` over each class.

    `classes` is one-hot over K classes of tokens. Padding is zero in all of them and counts nowhere.
    """
    entropy = -jnp.sum(routing.probs * jnp.log(jnp.maximum(routing.probs, 1e-30)), axis=-1)
    return RouterUse(
        probs=jnp.einsum("bsk,bse->bke", classes, routing.probs),
        choices=jnp.einsum("bsk,bse->bke", classes, routing.choice),
        entropy=jnp.einsum("bsk,bs->bk", classes, entropy),
    )


def balance_loss_sum(use: RouterUse, kind: Literal["per_layer", "pooled"]) -> Float[Array, ""]:
    """Returns the balance loss summed over segments; divide by their number for the mean.

    For one segment it is ``sum_e c_e p_e``, with c_e the share of its tokens sent to e (no gradient) and p_e their mean
    probability (LLaVA-MoLE, arXiv 2401.16160); 1 / E when routing is uniform. `per_layer` averages this over layers.
    `pooled` takes c and p over all layers at once (released code), so it cannot see one layer collapse. The result is
    a sum over segments so that the pieces of an accumulated batch add up.
    """
    probs, choices = use.probs, use.choices
    if kind == "pooled":
        probs, choices = probs.sum(axis=0, keepdims=True), choices.sum(axis=0, keepdims=True)
    tokens = jnp.maximum(choices.sum(axis=-1), 1.0)
    # The choice is an argmax without a gradient, so none has to be stopped.
    per_segment = jnp.sum(choices * probs, axis=-1) / tokens**2
    return per_segment.mean(axis=0).sum()


def domain_loss_sum(use: RouterUse, domain_ids: Int[Array, "B K"]) -> Float[Array, ""]:
    """Returns the loss that teaches routers the domains, summed over segments.

    For one segment of domain d it is ``-log p_k`` averaged over layers, with k = d modulo E and p_k the segment's mean
    probability of expert k. It is ours: LLaVA-MoLE does not tell the router about domains.
    """
    tokens, experts = use.choices.sum(axis=-1), use.probs.shape[-1]
    wanted = jnp.sum(use.probs * jax.nn.one_hot(domain_ids % experts, experts), axis=-1)
    surprise = -jnp.log(jnp.maximum(wanted, 1e-6) / jnp.maximum(tokens, 1.0))
    return jnp.where(tokens > 0, surprise, 0.0).mean(axis=0).sum()
