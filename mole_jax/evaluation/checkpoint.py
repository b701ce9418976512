"""Evaluation of a checkpoint outside its run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from etils import epath

from mole_jax.config import Config, DataConfig
from mole_jax.data.load import settled
from mole_jax.errors import UserError
from mole_jax.evaluation.runner import Evaluator, result_file
from mole_jax.model.objective import Forward
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel import hosts
from mole_jax.parallel.sharding import replicated
from mole_jax.parameters import Tree, unflatten
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.open import open_model, open_source, with_own_quantisation
from mole_jax.weights.source import Source


def evaluate_checkpoint(
    config: Config, checkpoint: str, workdir: epath.Path, *, base: str | None = None, alpha: float | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint on the tasks of `config` and writes into `workdir`; the same call goes on after a kill.

    Architecture, adapters with their router setting, prompt and image preparation are the checkpoint's own;
    a HF folder names no prompt, so there the config's are used.

    Args:
        config: the tasks.
        checkpoint: a run's folder, a HF folder, a hub name or whatever else `open_source` recognises.
        workdir: for predictions, scores and the use of the experts.
        base, alpha: as in `open_source`.

    Returns:
        As `Evaluator.run`.

    Raises:
        UserError: the checkpoint, its tokenizer or a task cannot be read; or `workdir` has results already, or
            answers of another checkpoint or other settings.
    """
    source = open_source(checkpoint, base=base, alpha=alpha)
    step = source.step or 0
    if hosts.first("evaluated", result_file(workdir, step).exists):
        raise UserError(f"{result_file(workdir, step)}: results are there already; choose another --workdir")
    own = place_checkpoint(config, source)
    forward = Forward(own.config, own.spec.graph, len(own.config.data.domains))
    forward_step = jax.jit(forward.evaluation_step, out_shardings=replicated(own.mesh))
    evaluator = Evaluator(
        config=own.config,
        arch=own.spec.arch,
        graph=own.spec.graph,
        mesh=own.mesh,
        tokenizer=own.tokenizer,
        step=forward_step,
    )
    return evaluator.run(workdir, step, own.params, {}, generate=config.evaluation.generate, strict=True)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A checkpoint's model on the mesh, and what it takes to show it data."""

    config: Config
    """With the checkpoint's own adapters, prompt and image preparation."""
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    spec: ModelSpec
    params: Tree
    """All arrays."""


def place_checkpoint(config: Config, source: Source) -> Placed:
    """Loads all of `source` onto the mesh of `config`.

    Raises:
        UserError: there is no tokenizer or not the model's, the weights cannot be read, or the mesh does not fit.
    """
    config = dataclasses.replace(
        config,
        model=with_own_quantisation(config.model, source),
        adapter=source.adapter,
        data=with_own_prompt(config.data, source),
    )
    opened = open_model(config, source)
    data = settled(config.data, opened.tokenizer, source.architecture.image)
    config = dataclasses.replace(config, data=data)
    return Placed(config, opened.mesh, opened.tokenizer, opened.spec, unflatten(opened.place()))


def with_own_prompt(data: DataConfig, source: Source) -> DataConfig:
    """Returns `data` with the prompt and image preparation that the weights were trained with, where they say it."""
    if source.prompt or source.image_aspect:  # trained here: its architecture has them
        data = dataclasses.replace(data, exif=None, transparency=None)
    return dataclasses.replace(
        data, prompt=source.prompt or data.prompt, image_aspect=source.image_aspect or data.image_aspect
    )
