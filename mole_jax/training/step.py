"""The training step: a pure function of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from mole_jax.config import Config
from mole_jax.model.objective import Arrays, Forward, Sums, tokens_of_examples
from mole_jax.parallel.sharding import constrain
from mole_jax.parameters import Parameter, Tree
from mole_jax.training.optimizer import Schedule, scale_by_group


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]
    """Batches seen."""
    applied: Int[Array, ""]
    """Updates applied; the learning rate follows this. Lags `step` where a batch gave NaN or Inf."""
    params: Tree
    """Trainable parameters, float32."""
    opt_state: Any
    """Optimizer state."""


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as jax.jit wants of what it calls
class TrainStep:
    """The training step; the caller jits it."""

    config: Config
    forward: Forward
    declarations: Mapping[str, Parameter]
    tx: optax.GradientTransformation
    factor: Schedule

    def __call__(
        self, state: TrainState, frozen: Tree, batch: Arrays, seed: Int[Array, ""] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """Applies one update; leaves parameters and optimizer as they are if loss, gradient or update is not finite.

        `seed` is that of dropout. None: the config's.
        """
        config = self.config
        key = jax.random.fold_in(jax.random.key(config.seed if seed is None else seed), state.step)
        # Of the whole batch, so that its pieces add up to the gradient of the undivided batch.
        units = jnp.maximum(self._units(batch), 1).astype(jnp.float32)
        segments = jnp.maximum(batch["segment_ids"].max(axis=1).sum(), 1).astype(jnp.float32)

        def objective(params: Tree, piece: Arrays, key: Array) -> tuple[Array, Sums]:
            sums = self.forward.sums(params, frozen, piece, key, config.train.loss_average)
            adapter = config.adapter
            routing = (adapter.balance_weight * sums.balance + adapter.domain_weight * sums.domain) / segments
            return sums.losses.sum() / units + routing, sums

        gradient = jax.value_and_grad(objective, has_aux=True)
        (total, sums), grads = self.accumulate(gradient, state.params, batch, key)
        norm = optax.tree.norm(grads)
        # The update too: a finite gradient can still overflow in the moments, the decay or the learning rate.
        fine = jnp.isfinite(total) & jnp.isfinite(norm) & _finite(self.update(grads, state))
        # Worked out again to be applied: old and new are not there together, which would take the memory of a second
        # state, and the new one is written over the old.
        grads, state, fine = jax.lax.optimization_barrier((grads, state, fine))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(fine, new, old), self.update(grads, state), (state.params, state.opt_state)
        )
        metrics = {
            "finite": fine,
            "total_loss": total,
            "balance_loss": sums.balance / segments,
            "grad_norm": norm,
            "learning_rate": self.factor(state.applied) * config.optimizer.learning_rate,
            "sums": sums,
        }
        return TrainState(state.step + 1, state.applied + fine, params, opt_state), metrics

    def _units(self, batch: Arrays) -> Int[Array, ""]:
        """Returns what the loss of a batch is divided by: its supervised tokens, or its examples that have any."""
        mask = batch["loss_mask"]
        if self.config.train.loss_average == "token":
            return mask.sum()
        return (tokens_of_examples(mask, batch["segment_ids"], self.config.data.examples_per_row) > 0).sum()

    def update(self, grads: Tree, state: TrainState) -> tuple[Tree, Any]:
        """Returns parameters and optimizer state after an update by these gradients."""
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        factor = self.factor(state.applied)
        updates = scale_by_group(cast(Tree, updates), factor, self.config.optimizer, self.declarations)
        return cast(Tree, optax.apply_updates(state.params, updates)), opt_state

    def accumulate(self, gradient, params: Tree, batch: Arrays, key: Array):
        """Sums objective, `Sums` and gradients over the pieces of the batch, one piece at a time."""
        pieces = self.config.train.accumulation
        if pieces == 1:
            return gradient(params, batch, key)

        def split(x: Array) -> Array:
            # Row i goes to piece i mod pieces, so that every device keeps its own rows.
            return constrain(jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0), None, "batch")

        def add(total, piece_and_key):
            return jax.tree.map(jnp.add, total, gradient(params, *piece_and_key)), None

        parts, keys = jax.tree.map(split, batch), jax.random.split(key, pieces)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts), key)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, start, (parts, keys))[0]


def _finite(tree: Any) -> Bool[Array, ""]:
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack(leaves).all()
