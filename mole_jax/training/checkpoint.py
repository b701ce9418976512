"""Saving and resuming a run (orbax)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mole_jax.config import CheckpointConfig
from mole_jax.files import explained
from mole_jax.parameters import flatten
from mole_jax.training.step import TrainState
from mole_jax.weights.checksums import changed, checksums
from mole_jax.weights.run import CHECKPOINTS, Damaged, Meta, check_space, reading, storing

HELD_OUT_LOSS = "held_out_loss"
_OPT_STATE = "moments"  # its name in the checkpoints of all versions
_CHECKSUMS = "checksums"  # of the optimizer and the counters, beside the data position
_FORMER_CHECKSUM = "checksum"


class Checkpointer:
    """Writes in the background what a run needs to go on: trainable arrays, optimizer, counters, data position.

    The frozen base is not saved: `Meta` names it by content hash. Random keys follow from the seed and the
    step. Kept are the newest `keep_last` and the `keep_best` of lowest held-out loss.
    """

    def __init__(self, workdir: epath.Path, config: CheckpointConfig):
        self.folder, self._config = workdir / CHECKPOINTS, config
        best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics[HELD_OUT_LOSS],
            reverse=True,
            n=config.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        newest = preservation_policy.LatestN(config.keep_last)
        with storing(self.folder):
            self.manager = _Manager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy([newest, best]),
                    cleanup_tmp_directories=True,
                ),
                item_names=("params", "optimizer", "data", "meta"),
            )

    def steps(self) -> list[int]:
        """Returns the steps that have a finished checkpoint, the newest first."""
        return sorted(self.manager.all_steps(), reverse=True)

    def save(self, step: int, state: TrainState, data: dict[str, Any], meta: Meta, held_out: float | None) -> None:
        """Saves unless this step is saved already; returns when the arrays may be changed again.

        Raises:
            UserError: this checkpoint or the one before it cannot be written.
        """
        if step in self.manager.all_steps():
            return
        self.check_room(state)
        meta = dataclasses.replace(meta, checksums=checksums(flatten(state.params)))
        with storing(self.folder):
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(_rest(state)),
                    data=ocp.args.JsonSave({**data, _CHECKSUMS: checksums(_by_path(_rest(state)))}),
                    meta=ocp.args.JsonSave(meta.to_json()),
                ),
                metrics=None if held_out is None else {HELD_OUT_LOSS: held_out},
                force=True,
            )

    def restore(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state (in the shardings of `state`) and the data position saved at `step`.

        Raises:
            Damaged: the checkpoint cannot be read.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        wanted = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(_rest(abstract)),
            data=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        where = self.folder / str(step)
        with reading(where):
            found = self.manager.restore(step, args=wanted)
            rest, position = found["optimizer"], dict(found["data"])
            written = position.pop(_CHECKSUMS, {}), found["meta"].get("checksums", {})  # older versions have none
            position.pop(_FORMER_CHECKSUM, None)
            wrong = changed(_by_path(rest), written[0]) or changed(flatten(found["params"]), written[1])
            restored = TrainState(
                step=rest["step"], applied=rest["applied"], params=found["params"], opt_state=rest[_OPT_STATE]
            )
        if wrong:
            raise Damaged(where, f"{wrong} is not what was written")
        return restored, position

    def set_aside(self, step: int) -> epath.Path:
        """Gives a damaged checkpoint a name that is no step's, and returns it."""
        aside = self.folder / f"{step}.damaged"
        with explained(aside):
            (self.folder / str(step)).rename(aside)
        self.manager.reload()
        return aside

    def prune(self) -> None:
        """Deletes what a kill between writing and deleting left beyond the ones to keep."""
        steps = self.steps()
        measured = {step: metrics[HELD_OUT_LOSS] for step in steps if (metrics := self.manager.metrics(step))}
        best = sorted(measured, key=measured.__getitem__)[: self._config.keep_best]
        for step in steps[self._config.keep_last :]:
            if step not in best:
                self.manager.delete(step)

    def check_room(self, state: TrainState) -> None:
        """Checks that the disk has room for a checkpoint: before training, and before orbax's threads run out of it.

        Raises:
            UserError: it has not.
        """
        resumes = " (the same command then resumes from the newest checkpoint there)" if self.steps() else ""
        check_space(self.folder, state, resumes)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            UserError: the last checkpoint cannot be written.
        """
        with storing(self.folder):
            self.manager.wait_until_finished()
            self.manager.close()


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Returns False: orbax only counts seconds by it, and its asking, with numbers of its own, would lead jax's
        agreement on a step (`hosts.told_to_stop`) astray."""
        return False


def _rest(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "applied": state.applied, _OPT_STATE: state.opt_state}


def _by_path(tree: Any) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
