"""Several seeds of one run at once on one device, by `jax.vmap`, for models too small to fill it alone.

What is stepped together are the states. All else is each run's own and that of `mole_jax.training`: set-up, data, logs
and bad steps, evaluation, checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mole_jax.config import Config, EvaluationConfig
from mole_jax.data.load import Loader
from mole_jax.data.mixture import Mixture
from mole_jax.errors import UserError
from mole_jax.parallel import hosts
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import replicated
from mole_jax.parameters import flatten
from mole_jax.training.checkpoint import Checkpointer
from mole_jax.training.loop import evaluate, introduce, save
from mole_jax.training.prefetch import Prefetch
from mole_jax.training.setup import Run, set_up
from mole_jax.training.step import TrainState
from mole_jax.training.step_log import StepLog
from mole_jax.training.telemetry import MetricsWriter, Progress


@dataclasses.dataclass(frozen=True)
class KeptLoader(Loader):
    """Keeps every record that it has read, for data that are read by many runs and fit into memory."""

    kept: dict[tuple[int, int], dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __call__(self, key: tuple[int, int]) -> dict[str, Any]:
        """As `Loader`'s."""
        place = int(key[0]), int(key[1])
        if place not in self.kept:
            self.kept[place] = super().__call__(key)
        return dict(self.kept[place])


class Programs(NamedTuple):
    """What is compiled for runs that differ in data and seed alone."""

    step: Any
    """Of the states of all seeds (donated), the frozen arrays, the batches of all seeds and the seeds: the next states,
    and the output of each seed in a list."""
    evaluation_step: Any
    """Of one seed."""


class Lane:
    """What one seed's run has for itself while the states are stepped together. Use as a context manager."""

    def __init__(self, run: Run, *, first: bool, of: int):
        self.run = run
        self.progress = Progress(
            run.total_steps, prefix=f"seed {run.config.seed}: ", show=hosts.is_first(), show_steps=first
        )
        self._opened = contextlib.ExitStack()
        writer = MetricsWriter(run.workdir, resume_step=None) if hosts.is_first() else None
        self.log = StepLog(run, writer and self._opened.enter_context(writer), self.progress, sharing=of)
        self._source = self._opened.enter_context(Prefetch(run.mixture))

    def draw(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the run's next batch."""
        with self.log.waiting_for_data():
            self._batch, self._position = next(self._source)
        return self._batch.arrays()

    def add(self, step: int, output: Mapping[str, Any]) -> None:
        """Takes the output of the step on the batch that was drawn last."""
        self.log.add(step, self._batch, output)

    def evaluate(self, step: int, state: TrainState) -> None:
        generate = self.run.config.evaluation.generate and step in (0, self.run.total_steps)
        evaluate(self.run, step, state, self.progress, generate=generate)

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state after the batch that was drawn last."""
        checkpointer = Checkpointer(self.run.workdir, self.run.config.checkpoint)
        save(self.run, checkpointer, step, state, self._position, None)
        checkpointer.close()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        self.progress.close()


class SeedsTogether:
    """Trains seeds of one run together, run after run; keeps the programs and the records that the next may need."""

    def __init__(self) -> None:
        self._programs: dict[Any, Programs] = {}
        self._loaders: dict[Any, KeptLoader] = {}

    def train(self, configs: Sequence[Config], workdirs: Sequence[epath.Path]) -> None:
        """Trains and evaluates runs that differ in nothing but the seed, from their beginning to their end.

        Each leaves a run's folder. The result of the last step comes last, since its being there means that all is.

        Raises:
            UserError: as `mole_jax.training.loop.train`, where too many bad steps in a row of one seed stop all; or
                the runs cannot share a device or a base.
        """
        runs = self._set_up(configs, workdirs)
        config, total, frozen = runs[0].config, runs[0].total_steps, runs[0].frozen
        step_all, seeds = self._programs[_program_key(runs[0])].step, jnp.asarray([one.seed for one in configs])
        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(run.state for run in runs))
        introduce(runs[0], 0, Progress(total, show=hosts.is_first(), show_steps=False))
        with contextlib.ExitStack() as opened:
            lanes = [opened.enter_context(Lane(run, first=run is runs[0], of=len(runs))) for run in runs]
            if config.evaluation.at_start:
                _evaluate(lanes, 0, states)
            step = 0
            for step in range(1, total + 1):
                drawn = jax.tree.map(lambda *leaves: np.stack(leaves), *(lane.draw() for lane in lanes))
                arrays = jax.device_put(drawn, replicated(runs[0].mesh))
                with jax.transfer_guard("disallow"):
                    states, outputs = step_all(states, frozen, arrays, seeds)
                for lane, output in zip(lanes, outputs, strict=True):
                    lane.add(step, output)
                due = config.evaluation.every and step % config.evaluation.every == 0 and step < total
                if step in (1, total) or due:
                    # Compiling, at the first step, and evaluating are not in the speed.
                    for lane in lanes:
                        lane.log.flush()
                    if due:
                        _evaluate(lanes, step, states)
                    for lane in lanes:
                        lane.log.restart_clock()
                if any(lane.log.too_many_bad_steps for lane in lanes):
                    break
            for i, lane in enumerate(lanes):
                if lane.log.too_many_bad_steps:
                    lane.save(step, _of_seed(states, i))
                    raise lane.log.bad_steps_error(step)
            for i, lane in enumerate(lanes):
                lane.save(step, _of_seed(states, i))
            _evaluate(lanes, step, states)

    def _set_up(self, configs: Sequence[Config], workdirs: Sequence[epath.Path]) -> list[Run]:
        """Opens the runs; they share the frozen arrays, the programs and the records that are read."""
        assert all(dataclasses.replace(one, seed=configs[0].seed) == configs[0] for one in configs)
        if configs[0].model.base is None:
            raise UserError("study: seeds that train together need a base that they share; give model.base")
        if (devices := make_mesh(configs[0].mesh).size) > 1:
            raise UserError(f"study: seeds train together on one device, the mesh has {devices}; set mesh.data 1")
        first, *others = (set_up(config, workdir) for config, workdir in zip(configs, workdirs, strict=True))
        for other in others:
            for path, leaf in flatten(other.frozen).items():
                if not jnp.array_equal(leaf, flatten(first.frozen)[path]):
                    raise UserError(f"study: the base lacks {path}, which does not train; give a whole base")
        key, data = _program_key(first), _data_key(first.config)
        if key not in self._programs:
            self._programs[key] = _compiled(first, len(configs))
        if data not in self._loaders:
            loader = first.mixture.loader
            fields = {field.name: getattr(loader, field.name) for field in dataclasses.fields(loader)}
            self._loaders[data] = KeptLoader(**fields)
        return [
            dataclasses.replace(
                run,
                frozen=first.frozen,
                evaluation_step=self._programs[key].evaluation_step,
                mixture=Mixture(
                    run.config.data,
                    self._loaders[data],
                    seed=run.config.seed,
                    rows=run.config.train.batch_rows,
                ),
            )
            for run in (first, *others)
        ]


def _compiled(run: Run, seeds: int) -> Programs:
    over_seeds = jax.vmap(run.maker.train_step, in_axes=(0, None, 0, 0))

    def step(*arguments: Any) -> tuple[TrainState, list[dict[str, Any]]]:
        states, outputs = over_seeds(*arguments)
        return states, [jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i in range(seeds)]

    return Programs(jax.jit(step, donate_argnums=0), run.evaluation_step)


def _program_key(run: Run) -> Any:
    """Returns all that a program depends on: of the config not the seed, nor where the data come from."""
    domains = tuple(dataclasses.replace(one, path="", weight=1.0) for one in run.config.data.domains)
    data = dataclasses.replace(run.config.data, domains=domains)
    config = dataclasses.replace(run.config, name="", seed=0, data=data, evaluation=EvaluationConfig())
    return config, run.spec.arch


def _data_key(config: Config) -> Any:
    """Returns all that a record read depends on; arms differ in the weights of the domains alone."""
    domains = tuple(dataclasses.replace(one, weight=1.0) for one in config.data.domains)
    return config.model, dataclasses.replace(config.data, domains=domains)


def _of_seed(states: TrainState, i: int) -> TrainState:
    return jax.tree.map(lambda leaf: leaf[i], states)


def _evaluate(lanes: Sequence[Lane], step: int, states: TrainState) -> None:
    for i, lane in enumerate(lanes):
        lane.evaluate(step, _of_seed(states, i))
