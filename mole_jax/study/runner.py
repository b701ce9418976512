"""The queue: every arm with every seed, each in its own folder, what is done left out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from mole_jax.config import Config
from mole_jax.evaluation.answers import write_whole
from mole_jax.evaluation.runner import result_file
from mole_jax.parallel import hosts
from mole_jax.parameters import group_of
from mole_jax.study.config import Arm, Study, arms
from mole_jax.study.together import Bench
from mole_jax.terminal import escaped
from mole_jax.training.loop import train
from mole_jax.training.state import ModelSpec
from mole_jax.training.telemetry import read_metrics
from mole_jax.weights.source import open_base

POLL_SECONDS = 5.0


def run(study: Study, workdir: epath.Path, *, part: int = 0, parts: int = 1) -> None:
    """Runs what is not done of the `part`-th of `parts` equal parts of the arms; the same call goes on after a kill.

    A run that trains alone goes on from its last checkpoint; seeds that train together begin anew.

    Raises:
        UserError: the study makes no sense, or an arm cannot be run.
    """
    grid = arms(study)
    if hosts.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
    if study.prepare is not None:
        _prepare(study.prepare, workdir / "prepared", part)
    if hosts.is_first():
        write_whole(workdir / "study.json", json.dumps(_described(study, grid), indent=1))
    benches: list[tuple[Any, Bench]] = []
    for number, arm in enumerate(grid[part::parts], start=1):
        todo = [seed for seed in study.seeds if not _done(arm, _folder(workdir, arm, seed))]
        for start in range(0, len(todo), study.together):
            seeds = todo[start : start + study.together]
            of = len(grid[part::parts])
            _say(f"{number} of {of}: {arm.name}, {arm.config.train.steps} steps, seed {_listed(seeds)}")
            folders = [_folder(workdir, arm, seed) for seed in seeds]
            if study.together > 1:
                _bench(benches, arm.config).train([arm.with_seed(seed) for seed in seeds], folders)
            else:
                train(arm.with_seed(seeds[0]), folders[0])
            if hosts.is_first():
                for folder in folders:
                    _time(folder, len(seeds))


def _prepare(prepare: Callable[[], None], done: epath.Path, part: int) -> None:
    """Makes data and base in the first part; the others wait for it."""
    if part == 0:
        prepare()
        if hosts.is_first():
            write_whole(done, "")
    elif not done.exists():
        _say(f"waiting for part 0 to make data and base ({done})")
        while not done.exists():
            time.sleep(POLL_SECONDS)


def _bench(benches: list[tuple[Any, Bench]], config: Config) -> Bench:
    """Returns the bench for runs like `config`, made once for all that read the same data."""
    paths = [(domain.name, domain.path, domain.image_root) for domain in config.data.domains]
    key = (paths, config.model, config.mesh, config.evaluation, config.data.prompt, config.data.sequence_length)
    for known, bench in benches:
        if known == key:
            return bench
    benches.append((key, Bench(config)))
    return benches[-1][1]


def _folder(workdir: epath.Path, arm: Arm, seed: int) -> epath.Path:
    return workdir / "runs" / arm.slug / f"seed_{seed}"


def _done(arm: Arm, folder: epath.Path) -> bool:
    assert arm.config.train.steps is not None
    return hosts.first("done", result_file(folder, arm.config.train.steps).exists)


def _time(folder: epath.Path, together: int) -> None:
    seconds = [line["step_seconds"] for line in read_metrics(folder) if line.get("step_seconds") is not None]
    if seconds:
        timing = {"step_seconds": float(np.median(seconds)), "batched": together}
        write_whole(folder / "timing.json", json.dumps(timing))


def _described(study: Study, grid: Sequence[Arm]) -> dict[str, Any]:
    """Returns the grid as the report reads it."""
    trainable = {}
    for arm in grid:
        arch = open_base(arm.config.model, arm.config.seed).architecture
        declared = ModelSpec.of(arch, arm.config.adapter).declarations.values()
        trainable[arm.name] = sum(leaf.size for leaf in declared if group_of(leaf) in arm.config.train.trainable)
    return {
        "name": study.name,
        "domains": [domain.name for domain in study.run.data.domains],
        "seeds": study.seeds,
        "arms": [
            {
                "name": arm.name,
                "slug": arm.slug,
                "mixture": arm.mixture,
                "adapter": arm.adapter,
                "shares": arm.shares,
                "steps": arm.config.train.steps,
                "trainable": trainable[arm.name],
                "kind": arm.config.adapter.kind,
                "experts": arm.config.adapter.experts,
                "sections": arm.sections,
            }
            for arm in grid
        ],
        "baseline": study.baseline,
        "comparisons": [{"a": a, "b": b} for a, b in study.comparisons],
        "curves": [
            {
                "name": curve.name,
                "axis": curve.axis,
                "points": [
                    {"value": value, "mixture": mixed, "own": [own[one.name] for one in study.run.data.domains]}
                    for value, mixed, own in curve.points
                ],
            }
            for curve in study.curves
        ],
        "score": ", ".join(sorted({task.metric for task in study.run.evaluation.tasks})),
    }


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _say(line: str) -> None:
    if hosts.is_first():
        print(escaped(line), file=sys.stderr, flush=True)
