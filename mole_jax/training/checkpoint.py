"""Saving and resuming a run (orbax)."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mole_jax.config import CheckpointConfig
from mole_jax.training.step import TrainState
from mole_jax.weights.run import CHECKPOINTS, Meta

HELD_OUT_LOSS = "held_out_loss"


class Checkpointer:
    """Writes in the background what a run needs to go on: trainable arrays, optimizer, counters, data position.

    The frozen base is not saved: `Meta` names it by content hash. Random keys follow from the seed and the
    step. Kept are the newest `keep_last` and the `keep_best` of lowest held-out loss.
    """

    def __init__(self, workdir: epath.Path, config: CheckpointConfig):
        best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics[HELD_OUT_LOSS],
            reverse=True,
            n=config.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        newest = preservation_policy.LatestN(config.keep_last)
        self.manager = ocp.CheckpointManager(
            workdir / CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy([newest, best]),
                cleanup_tmp_directories=True,
            ),
            item_names=("params", "optimizer", "data", "meta"),
        )

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict[str, Any], meta: Meta, held_out: float | None) -> None:
        """Saves unless this step is saved already; returns when the arrays may be changed again."""
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_rest(state)),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave(meta.to_json()),
            ),
            metrics=None if held_out is None else {HELD_OUT_LOSS: held_out},
            force=True,
        )

    def restore(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state (in the shardings of `state`) and the data position saved at `step`."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        found = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                optimizer=ocp.args.StandardRestore(_rest(abstract)),
                data=ocp.args.JsonRestore(),
            ),
        )
        rest = found["optimizer"]
        return TrainState(rest["step"], rest["applied"], found["params"], rest["moments"]), found["data"]

    def close(self) -> None:
        """Waits until everything is written."""
        self.manager.wait_until_finished()
        self.manager.close()


def _rest(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "applied": state.applied, "moments": state.moments}
