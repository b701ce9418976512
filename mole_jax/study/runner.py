"""The queue: every arm with every seed, each in its own folder, what is done left out."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from mole_jax.config import Config
from mole_jax.evaluation.runner import result_file
from mole_jax.files import made, write_json, write_text
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel import hosts
from mole_jax.parameters import group_of
from mole_jax.study import materials
from mole_jax.study.config import Study
from mole_jax.study.grid import Arm, Grid, lay_out
from mole_jax.study.together import SeedsTogether
from mole_jax.terminal import escaped
from mole_jax.training.loop import train
from mole_jax.training.telemetry import read_metrics
from mole_jax.weights.open import open_base
from mole_jax.weights.run import CHECKPOINTS, latest_step

POLL_SECONDS = 5.0


def run(study: Study, workdir: epath.Path, *, part: int = 0, parts: int = 1) -> None:
    """Runs what is not done of the `part`-th of `parts` equal parts of the arms; the same call goes on after a kill.

    A run goes on from its newest checkpoint; seeds that train together do if their checkpoints are of one step.

    Raises:
        UserError: the study makes no sense, or an arm cannot be run.
    """
    grid, configs = lay_out(study)
    if hosts.is_first():
        made(workdir)
    _make_materials(study, workdir / "prepared", part)
    if hosts.is_first():
        write_json(workdir / "study.json", _counted(grid, configs).to_json())
    several, mine = SeedsTogether(), grid.arms[part::parts]
    for number, arm in enumerate(mine, start=1):
        todo = [seed for seed in study.seeds if not _done(arm, _folder(workdir, arm, seed))]
        for start in range(0, len(todo), study.together):
            seeds = todo[start : start + study.together]
            _say(f"{number} of {len(mine)}: {arm.name}, {arm.steps} steps, seed {', '.join(map(str, seeds))}")
            folders = [_folder(workdir, arm, seed) for seed in seeds]
            runs = [dataclasses.replace(configs[arm.name], seed=seed) for seed in seeds]
            if study.together > 1:
                several.train(runs, folders)
            else:
                train(runs[0], folders[0])
            if hosts.is_first():
                for folder in folders:
                    _time(folder, len(seeds))


def _make_materials(study: Study, done: epath.Path, part: int) -> None:
    """Makes data and bases in the first part; the others wait for it."""
    if not (study.data or study.bases):
        return
    if part == 0:
        materials.make(study)
        if hosts.is_first():
            write_text(done, "")
    elif not done.exists():
        _say(f"waiting for part 0 to make data and base ({done})")
        while not done.exists():
            time.sleep(POLL_SECONDS)


def _folder(workdir: epath.Path, arm: Arm, seed: int) -> epath.Path:
    return workdir / "runs" / arm.slug / f"seed_{seed}"


def _done(arm: Arm, folder: epath.Path) -> bool:
    """Tells whether a run has its last result and checkpoint, between which a kill can come; users may delete all."""

    def whole() -> bool:
        saved = not (folder / CHECKPOINTS).exists() or latest_step(folder) == arm.steps
        return saved and result_file(folder, arm.steps).exists()

    return hosts.first("done", whole)


def _time(folder: epath.Path, together: int) -> None:
    seconds = [line["step_seconds"] for line in read_metrics(folder) if line.get("step_seconds") is not None]
    if seconds:
        write_json(folder / "timing.json", {"step_seconds": float(np.median(seconds)), "batched": together})


def _counted(grid: Grid, configs: Mapping[str, Config]) -> Grid:
    """Returns the grid with the numbers that each arm trains."""

    def trainable(config: Config) -> int:
        arch = open_base(config.model, config.seed).architecture
        declared = ModelSpec.of(arch, config.adapter).declarations.values()
        return sum(leaf.size for leaf in declared if group_of(leaf) in config.train.trainable)

    arms: Sequence[Arm] = [dataclasses.replace(arm, trainable=trainable(configs[arm.name])) for arm in grid.arms]
    return dataclasses.replace(grid, arms=tuple(arms))


def _say(line: str) -> None:
    if hosts.is_first():
        print(escaped(line), file=sys.stderr, flush=True)
