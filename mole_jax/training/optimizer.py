"""AdamW with a learning rate per parameter group."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import optax

from mole_jax.config import OptimizerConfig
from mole_jax.parameters import Parameter, Tree, flatten, group_of, unflatten

Schedule = Callable[[jax.Array], jax.Array]


def make_tx(config: OptimizerConfig, declarations: Mapping[str, Parameter]) -> optax.GradientTransformation:
    """Returns the transformation from gradients to AdamW's step direction, before the learning rate.

    Clipping by the global norm comes first, as in every trainer of the field; weight decay is decoupled
    (Loshchilov and Hutter 2019) and touches only what was declared with `decay`: matrices.
    """

    def decayed(params: Tree) -> Tree:
        return unflatten({path: declarations[path].get_metadata("decay") for path in flatten(params)})

    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return optax.chain(*parts)


def peak_learning_rates(config: OptimizerConfig) -> dict[str, float]:
    """Returns the peak learning rate of each group; a group without its own has the adapters'."""
    own = {
        "adapters": config.learning_rate,
        "router": config.router_learning_rate,
        "projector": config.projector_learning_rate,
        "vision": config.base_learning_rate,
        "decoder": config.base_learning_rate,
    }
    return {group: config.learning_rate if rate is None else rate for group, rate in own.items()}


def schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Returns the factor on the peak learning rate at each applied step: warm-up from 0, then `config.schedule`."""
    warmup = round(config.warmup_fraction * total_steps)
    rest = max(total_steps - warmup, 1)
    after: optax.Schedule = {
        "cosine": lambda: optax.cosine_decay_schedule(1.0, rest),
        "linear": lambda: optax.linear_schedule(1.0, 0.0, rest),
        "constant": lambda: optax.constant_schedule(1.0),
    }[config.schedule]()
    # As in transformers, step 0 of a warm-up has a learning rate of 0.
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, max(warmup, 1)), after], [warmup])  # pyright: ignore


def scale_by_group(
    updates: Tree, factor: jax.Array, config: OptimizerConfig, declarations: Mapping[str, Parameter]
) -> Tree:
    """Returns ``-learning_rate * update`` with the rate of each parameter's group."""
    peaks = peak_learning_rates(config)
    return unflatten(
        {path: -factor * peaks[group_of(declarations[path])] * update for path, update in flatten(updates).items()}
    )
