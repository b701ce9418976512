"""Checkpoints of the tiny model with random weights, and the config of the tasks that they are scored on."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path

from mole_jax.config import AdapterConfig, MeshConfig
from mole_jax.files import absolute
from mole_jax.model.architecture import preset
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.weights import run
from mole_jax.weights.open import place
from mole_jax.weights.sources import RandomSource
from tests import tiny
from tests.weights.runs import trained_run

MODEL = {"preset": None, "base": "-"}
"""What a config says of its model where the checkpoint says it all."""


def write_base(folder: Path) -> Path:
    """Writes a base of random weights and returns its folder."""
    architecture, adapter = preset("tiny"), AdapterConfig(kind="none")
    spec = ModelSpec.of(architecture, adapter)
    source = RandomSource(architecture, 0)
    leaves = place(spec, source, make_mesh(MeshConfig(data=1)), (), "float32", 0)
    meta = run.Meta(architecture, adapter, (), None, None, None, "of random weights", 0)
    run.write_params(absolute(str(folder)), leaves, meta)
    return folder


def write_run(folder: Path, base: Path, **adapter) -> Path:
    """Writes a run with random adapters on `base` and returns its folder."""
    trained_run(folder, base, **adapter)
    return folder


def config(data: Path, *tasks: dict, **sections):
    """Returns the config of `tiny` with these tasks, each as changes of the first one of `tiny`."""
    found = tiny.config(data, **{"model": MODEL} | sections)
    changed = tuple(dataclasses.replace(found.evaluation.tasks[0], **task) for task in tasks)
    return dataclasses.replace(found, evaluation=dataclasses.replace(found.evaluation, tasks=changed))


def documented(words: str, **paths: object) -> list[str]:
    """Returns the one command of docs/evaluation.md that has `words`, with `paths` for those of the same name there."""
    (line,) = [line for line in commands() if words in line]
    argv = [str(paths.get(word.rpartition("/")[2].removesuffix(".py"), word)) for word in shlex.split(line)]
    return [sys.executable, *argv[1:]]


def commands() -> list[str]:
    """Returns the commands of docs/evaluation.md."""
    blocks = (tiny.ROOT / "docs" / "evaluation.md").read_text().split("```bash\n")[1:]
    return [line for block in blocks for line in block.partition("```")[0].strip().splitlines()]
