"""Evaluation of a checkpoint outside its run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from etils import epath

from mole_jax.config import Config
from mole_jax.data.tokenizer import Tokenizer
from mole_jax.errors import UserError
from mole_jax.evaluation.runner import Evaluator, result_file
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import replicated
from mole_jax.parameters import unflatten
from mole_jax.training.setup import check_vocabulary
from mole_jax.training.state import ModelSpec, place
from mole_jax.training.step import Forward
from mole_jax.weights.source import RunSource, open_source, tokenizer_path


def evaluate_checkpoint(config: Config, checkpoint: str, workdir: epath.Path) -> dict[str, Any]:
    """Evaluates a run's folder, a HF folder or a hub name on the tasks of `config` and writes into `workdir`.

    Architecture, adapters with their router setting, prompt and image preparation are the checkpoint's own;
    a HF folder names no prompt, so there the config's are used.

    Returns:
        As `Evaluator.run`.

    Raises:
        UserError: the checkpoint, its tokenizer or a task cannot be read.
    """
    source = open_source(checkpoint)
    step = source.step if isinstance(source, RunSource) else 0
    if result_file(workdir, step).exists():
        raise UserError(f"{result_file(workdir, step)}: results are there already; choose another --workdir")
    data = dataclasses.replace(
        config.data,
        prompt=source.prompt or config.data.prompt,
        image_aspect=source.image_aspect or config.data.image_aspect,
    )
    config = dataclasses.replace(config, adapter=source.adapter, data=data)
    arch, mesh = source.architecture, make_mesh(config.mesh)
    tokenizer = Tokenizer.load(tokenizer_path(config.model, source))
    check_vocabulary(tokenizer, arch.decoder.vocab)
    spec = ModelSpec.of(arch, source.adapter)
    leaves = place(spec, source, mesh, source.trained, config.model.frozen_dtype, source.seed)
    forward = Forward(config, spec.graph, len(config.data.domains))
    forward_step = jax.jit(forward.evaluation_step, out_shardings=replicated(mesh))
    evaluator = Evaluator(config, arch, spec.graph, mesh, tokenizer, forward_step)
    return evaluator.run(workdir, step, unflatten(leaves), {}, generate=config.evaluation.generate)
