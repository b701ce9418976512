"""A run's checkpoint on disk: which arrays it holds and what it says about itself.

``checkpoints/<step>/params`` holds the arrays by path (orbax), ``meta`` the facts that give them
meaning. The trainer adds ``optimizer`` and ``data`` (`mole_jax.training.checkpoint`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mole_jax import config_json
from mole_jax.config import AdapterConfig, ImageAspect, PromptName
from mole_jax.errors import UserError
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parameters import flatten, unflatten

CHECKPOINTS = "checkpoints"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself."""

    architecture: LlavaArchitecture
    adapter: AdapterConfig
    """Ranks, targets, router setting: inference uses the setting that the weights were trained with."""
    trained: tuple[str, ...]
    """Parameter groups that were trained; they are float32 and stored here. Empty for a converted base."""
    prompt: PromptName | None
    """Prompt preset of the training; None for a converted base."""
    image_aspect: ImageAspect | None
    """How images were made square; None for a converted base."""
    base: str | None
    """Folder or hub name of the weights that are not stored here; None: all are, or they are made from `seed`."""
    base_hash: str
    """SHA-256 of the base, by content."""
    seed: int
    """Seed of the weights that no file holds."""
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        return config_json.to_json(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Meta:
        if value.get("format") != FORMAT:
            raise UserError(
                f"{where}: checkpoint format {value.get('format')} is not {FORMAT}; use the version that wrote it"
            )
        return config_json.dataclass_from_json(dict(value), cls, where=where)


def absolute(path: str) -> epath.Path:
    """Returns a path that orbax takes: local ones made absolute, gs:// and the like as they are."""
    return epath.Path(path) if "://" in path else epath.Path(os.path.abspath(path))


def latest_step(folder: epath.Path) -> int | None:
    """Returns the newest complete checkpoint of a run's folder."""
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.exists():
        return None
    # Orbax writes under another name and renames at the end, so a number is a complete checkpoint.
    steps = [int(child.name) for child in checkpoints.iterdir() if child.name.isdigit()]
    return max(steps, default=None)


def _reader(folder: epath.Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=False)
    # The trainer's own items are named too, or orbax warns that it cannot read them.
    arrays, facts = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
    handlers = {"params": arrays(), "meta": facts(), "optimizer": arrays(), "data": facts()}
    return ocp.CheckpointManager(folder / CHECKPOINTS, options=options, item_handlers=handlers)


def read_meta(folder: epath.Path, step: int) -> Meta:
    """Reads what checkpoint `step` says about itself."""
    with _reader(folder) as reader:
        found = reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    return Meta.from_json(found["meta"], where=str(folder / CHECKPOINTS / str(step)))


def stored_shapes(folder: epath.Path, step: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays in checkpoint `step`, by path."""
    with _reader(folder) as reader:
        tree = reader.item_metadata(step)["params"].tree
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def read_params(folder: epath.Path, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays of checkpoint `step`, each into the shape, type and sharding that `abstract` gives.

    Raises:
        UserError: an array is stored in another shape.
    """
    where = folder / CHECKPOINTS / str(step) / "params"
    stored = stored_shapes(folder, step)
    for path, leaf in abstract.items():
        if stored[path] != leaf.shape:
            raise UserError(
                f"{where}: {path} has shape {stored[path]}, the config asks for {leaf.shape}; "
                "set rank, experts and architecture as they were in the run"
            )
    tree = unflatten(abstract)
    wanted = ocp.args.PyTreeRestore(
        tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return flatten(checkpointer.restore(where, args=wanted))


def read_arrays(folder: epath.Path, step: int) -> dict[str, np.ndarray]:
    """Reads the arrays of checkpoint `step` into host memory, as they were saved."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        where = folder / CHECKPOINTS / str(step) / "params"
        tree = unflatten(dict.fromkeys(stored_shapes(folder, step), ocp.RestoreArgs(restore_type=np.ndarray)))
        return flatten(checkpointer.restore(where, restore_args=tree))


def write_params(folder: epath.Path, params: Mapping[str, jax.Array], meta: Meta) -> None:
    """Writes a checkpoint 0 that holds arrays and facts only: a base for later runs."""
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder / CHECKPOINTS, options=options) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(unflatten(params)), meta=ocp.args.JsonSave(meta.to_json())
            ),
        )
