"""Several seeds of one run at once on one device, by `jax.vmap`, for models too small to fill it alone.

What is stepped together are the states. All else is each run's own and that of `mole_jax.training`: set-up, data, logs
and bad steps, evaluation, checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
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
from mole_jax.model.objective import Arrays
from mole_jax.parallel import hosts
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import replicated
from mole_jax.parameters import Tree, flatten
from mole_jax.training.checkpoint import Checkpointer
from mole_jax.training.loop import (
    TERMINATED,
    evaluate,
    gives_numbers,
    introduce,
    recorder,
    resume,
    save,
    sigterm,
    tell_left_out,
)
from mole_jax.training.prefetch import Prefetch
from mole_jax.training.progress import Progress
from mole_jax.training.setup import Run, set_up
from mole_jax.training.startup import STARTS_FILE, machine
from mole_jax.training.step import TrainState
from mole_jax.training.step_log import StepLog
from mole_jax.training.telemetry import record_events
from mole_jax.workdir import claimed


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


class SeedPrograms(NamedTuple):
    """What is compiled for runs that differ in data and seed alone."""

    step: Any
    """Of the states of all seeds (donated), the frozen arrays, the batches of all seeds and the seeds: the next states,
    and the output of each seed in a list."""
    evaluation_step: Any
    """Of one seed."""


class Lane:
    """What one seed's run has for itself while the states are stepped together."""

    def __init__(self, run: Run, *, first: bool):
        self.run, self.checkpointer = run, Checkpointer(run.workdir, run.config.checkpoint)
        said = f"seed {run.config.seed}: "
        self.progress = Progress(run.total_steps, prefix=said, show=hosts.is_first(), show_steps=first)

    def open(self, opened: contextlib.ExitStack, start: int, sharing: int) -> None:
        """Opens log and data, until `opened` is closed, for the steps after `start`."""
        opened.enter_context(self.progress)
        self._writer = opened.enter_context(recorder(self.run, start, self.progress))
        self.log = StepLog(self.run, self._writer, self.progress, sharing=sharing)
        self._source = opened.enter_context(Prefetch(self.run.mixture))

    def draw(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the run's next batch."""
        with self.log.waiting_for_data():
            self._batch, self._position = next(self._source)
        return self._batch.arrays()

    def add(self, step: int, output: Mapping[str, Any]) -> None:
        """Takes the output of the step on the batch that was drawn last."""
        self.log.add(step, self._batch, output)

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state after the batch that was drawn last."""
        save(self.run, self.checkpointer, step, state, position=self._position, held_out=None)

    def gives_numbers(self, state: TrainState) -> bool:
        """Tells whether the model is sound on rows of the batch that was drawn last."""
        return gives_numbers(self.run, state, self._batch)

    def evaluate(self, step: int, state: TrainState) -> None:
        generate = self.run.config.evaluation.generate and step in (0, self.run.total_steps)
        evaluate(self.run, step, state, self.progress, self._writer, generate=generate)


class SeedsTogether:
    """Trains seeds of one run together, run after run; keeps the programs and the records that the next may need."""

    def __init__(self) -> None:
        self._programs: dict[Any, SeedPrograms] = {}
        self._loaders: dict[Any, KeptLoader] = {}

    def train(self, configs: Sequence[Config], workdirs: Sequence[epath.Path]) -> None:
        """Trains runs that differ in nothing but the seed to the end; each leaves a run's folder.

        They go on from their newest checkpoints, if these are of one step. The result of the last step comes last:
        where it is, all is.

        Raises:
            UserError: as `mole_jax.training.loop.train`, where too many bad steps in a row of one seed stop all; or
                the runs cannot share a device or a base.
            SystemExit: with status 143 after a SIGTERM, once the states are saved.
        """
        with contextlib.ExitStack() as held:
            for workdir in workdirs if hosts.is_first() else ():
                held.enter_context(claimed(workdir))
            runs = self._set_up(configs, workdirs)
            lanes = [Lane(run, first=run is runs[0]) for run in runs]
            start, states = _resumed(lanes)
            progress = Progress(runs[0].total_steps, show=hosts.is_first(), show_steps=False)
            introduce(runs[0], start, progress)
            tell_left_out(runs[0], runs[0].mixture.survey, progress)
            self._steps(lanes, start, states)

    def _steps(self, lanes: Sequence[Lane], start: int, states: TrainState) -> None:
        """Takes all steps after `start`, as the loop of `mole_jax.training` does, and evaluates."""
        config, total = lanes[0].run.config, lanes[0].run.total_steps
        every, seeds = config.evaluation.every, jnp.asarray([lane.run.config.seed for lane in lanes], jnp.uint32)
        step_all = self._programs[_program_key(lanes[0].run)].step
        step, stop, sound = start, False, [True] * len(lanes)
        with contextlib.ExitStack() as opened:
            for lane in lanes:
                lane.open(opened, start, sharing=len(lanes))
            if start == 0 and config.evaluation.at_start:
                _evaluate(lanes, 0, states)
            with sigterm() as terminated:
                for step in range(start + 1, total + 1):
                    drawn = jax.tree.map(lambda *leaves: np.stack(leaves), *(lane.draw() for lane in lanes))
                    arrays = jax.device_put(drawn, replicated(lanes[0].run.mesh))
                    with jax.transfer_guard("disallow"):
                        states, outputs = step_all(states, lanes[0].run.frozen, arrays, seeds)
                    for lane, output in zip(lanes, outputs, strict=True):
                        lane.add(step, output)
                    last, due = step == total, bool(every) and step % every == 0
                    if step == start + 1:
                        for lane in lanes if hosts.is_first() else ():
                            record_events(lane.run.workdir / STARTS_FILE, step, [machine()])
                    if step == start + 1 or due or last:
                        _flush(lanes)
                        if due and not last:
                            _evaluate(lanes, step, states)
                        for lane in lanes:
                            lane.log.restart_clock()  # compiling at the first step, and evaluating, are left out
                    stop = terminated() or any(lane.log.too_many_bad_steps for lane in lanes)
                    if stop or last or step % config.checkpoint.every == 0:
                        _flush(lanes)
                        if stop or last:
                            sound = [lane.gives_numbers(_of_seed(states, i)) for i, lane in enumerate(lanes)]
                        for i, lane in enumerate(lanes) if all(sound) else ():
                            lane.save(step, _of_seed(states, i))
                    if stop:
                        break
            for lane in lanes:
                lane.checkpointer.close()
            for i, lane in enumerate(lanes):
                lane.log.check(step, int(states.applied[i]), sound=sound[i])
            if stop:
                lanes[0].progress.say(f"stopped by SIGTERM at step {step}; the same command resumes from there")
                sys.exit(TERMINATED)
            _evaluate(lanes, total, states)

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
            self._programs[key] = _compiled(first)
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


def _compiled(run: Run) -> SeedPrograms:
    over_seeds = jax.vmap(run.train_step, in_axes=(0, None, 0, 0))

    def step(states: TrainState, frozen: Tree, batches: Arrays, seeds: jax.Array) -> tuple[TrainState, list[Any]]:
        states, outputs = over_seeds(states, frozen, batches, seeds)
        # Cut here, where it costs nothing, and not array by array on the host's command.
        return states, [jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i in range(len(seeds))]

    return SeedPrograms(jax.jit(step, donate_argnums=0), run.evaluation_step)


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


def _resumed(lanes: Sequence[Lane]) -> tuple[int, TrainState]:
    """Returns the step to go on from and the states of all seeds.

    Runs that a kill left at different steps cannot go on together: they begin anew.
    """
    beginnings = [lane.run.mixture.get_state() for lane in lanes]
    found = [resume(lane.run, lane.checkpointer) for lane in lanes]
    if len({start for start, _, _ in found}) > 1:
        for lane, beginning in zip(lanes, beginnings, strict=True):
            lane.run.mixture.set_state(beginning)
        found = [(0, lane.run.state, []) for lane in lanes]
    for lane, (_, _, said) in zip(lanes, found, strict=True):
        for note in (*lane.run.unchecked, *said):
            lane.progress.say(note)
    return found[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state, _ in found))


def _of_seed(states: TrainState, i: int) -> TrainState:
    return jax.tree.map(lambda leaf: leaf[i], states)


def _flush(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.log.flush()


def _evaluate(lanes: Sequence[Lane], step: int, states: TrainState) -> None:
    for i, lane in enumerate(lanes):
        lane.evaluate(step, _of_seed(states, i))
