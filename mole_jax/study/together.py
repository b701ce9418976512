"""Several seeds of one run at once on one device, by `jax.vmap`, for models too small to fill it alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mole_jax import config_json
from mole_jax.config import Config, EvaluationConfig
from mole_jax.data.load import Layout, Loader, Source
from mole_jax.data.mixture import Mixture
from mole_jax.errors import UserError
from mole_jax.evaluation.runner import (
    expert_shares,
    held_out_result,
    open_held_out,
    result_file,
    write_expert_use,
)
from mole_jax.files import write_text
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.devices import peak_flops
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import put_batch, replicated
from mole_jax.parameters import Tree, flatten, split_trainable, unflatten
from mole_jax.training.checkpoint import Checkpointer
from mole_jax.training.flops import step_flops
from mole_jax.training.setup import prepare
from mole_jax.training.step import StepMaker, TrainState
from mole_jax.training.summary import speed_metrics, step_metrics
from mole_jax.training.telemetry import MetricsWriter
from mole_jax.weights.open import open_model
from mole_jax.weights.run import Meta
from mole_jax.weights.sources import locate


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


class Drawn(NamedTuple):
    """The batches of some seeds, stacked."""

    key: Any
    batches: list[dict[str, np.ndarray]]
    positions: list[dict[str, Any]]
    """Of the data after the last batch, by seed."""
    reports: list[dict[str, Any]]
    """What was handed out and what was skipped, by seed."""


class Programs(NamedTuple):
    """What is compiled for runs that differ in data and seed alone."""

    spec: ModelSpec
    maker: StepMaker
    step: Any
    """Training step of all seeds."""
    held_out: Any
    """Evaluation step of all seeds on one batch."""


@functools.lru_cache(maxsize=16)
def programs(config: Config, arch: LlavaArchitecture) -> Programs:
    """Returns the programs of runs like `config`, whose data and seed are not looked at."""
    spec, mesh = ModelSpec.of(arch, config.adapter), make_mesh(config.mesh)
    abstract = spec.abstract(mesh, config.train.trainable, config.model.frozen_dtype)
    assert config.train.steps is not None
    trainable = split_trainable(abstract, spec.declarations, config.train.trainable)[0]
    maker, _ = prepare(config, spec, mesh, trainable, config.train.steps)
    step = jax.jit(jax.vmap(maker.train_step, in_axes=(0, None, 0, 0)), donate_argnums=0)
    return Programs(spec, maker, step, jax.jit(jax.vmap(maker.forward.evaluation_step, in_axes=(0, None, None))))


def dataless(config: Config) -> Config:
    """Returns `config` without what no program depends on."""
    domains = tuple(dataclasses.replace(one, path="", weight=1.0) for one in config.data.domains)
    return dataclasses.replace(
        config,
        name="",
        seed=0,
        data=dataclasses.replace(config.data, domains=domains),
        evaluation=EvaluationConfig(),
    )


class Bench:
    """What the runs of a section have in common: base, tokenizer, the records read so far, the held-out batches."""

    def __init__(self, config: Config):
        """`config` is that of any of the runs; raises `UserError` for what cannot be opened."""
        if config.model.base is None:
            raise UserError("study: seeds that train together need a base that they share; give model.base")
        if config.train.accumulation != 1 or config.evaluation.generate:
            raise UserError(
                "study: seeds that train together take no train.accumulation and no evaluation.generate; "
                "set them to 1 and False, or `together` to 1"
            )
        opened = open_model(config)
        self.mesh, self.source, self.tokenizer = opened.mesh, opened.source, opened.tokenizer
        if self.mesh.size > 1:
            raise UserError(
                f"study: seeds train together on one device, the mesh has {self.mesh.size}; set mesh.data 1"
            )
        self.arch = self.source.architecture
        self.base_hash = self.source.content_hash()
        sources = tuple(Source.open(one.name, one.path, one.image_root) for one in config.data.domains)
        self.loader = KeptLoader(sources, self.tokenizer, Layout.of(config.data, self.arch.image))
        self._drawn: Drawn | None = None
        self.held_out: dict[str, list[Mapping[str, Any]]] = {}
        for task in config.evaluation.tasks:
            batches = open_held_out(task, config, self.arch, self.tokenizer, self.mesh)
            self.held_out[task.name] = [put_batch(batch.arrays(), self.mesh) for batch in batches]

    def train(self, configs: Sequence[Config], workdirs: Sequence[epath.Path]) -> None:
        """Trains and evaluates runs that differ in nothing but the seed; each leaves a run's folder, at the end.

        Raises:
            UserError: data or base do not fit the configs, or a seed had `train.max_bad_steps` steps that gave NaN.
        """
        config, seeds = configs[0], jnp.asarray([one.seed for one in configs])
        assert all(dataclasses.replace(one, seed=config.seed) == config for one in configs)
        spec, maker, step, held_out = programs(dataless(config), self.arch)
        params, frozen = self._weights(spec, config, seeds)
        total = config.train.steps
        assert total is not None
        steps, applied = (jnp.zeros(len(configs), jnp.int32) for _ in range(2))
        state = TrainState(steps, applied, params, jax.jit(jax.vmap(maker.direction.init))(params))
        drawn = self._batches(configs, total)
        flops = step_flops(config, self.arch, spec.declarations, config.train.trainable)

        outputs: list[tuple[int, dict[str, float], Any]] = []
        since, tokens, at = time.perf_counter(), 0, 0
        for number in range(1, total + 1):
            arrays = drawn.batches[number - 1]
            tokens += int(np.count_nonzero(arrays["segment_ids"])) // len(configs)
            state, output = step(state, frozen, jax.device_put(arrays, replicated(self.mesh)), seeds)
            if number == 1:
                # The first one compiles: it is not in the speed.
                jax.block_until_ready(output)
                since, tokens, at = time.perf_counter(), 0, 1
            elif number % config.train.log_every == 0 or number == total:
                host = jax.device_get(output)
                now = time.perf_counter()
                speed = speed_metrics(
                    # Of one seed: they shared the time.
                    seconds=(now - since) / len(configs),
                    steps=number - at,
                    waited=0.0,
                    tokens=tokens,
                    flops=flops,
                    peak_flops=peak_flops(self.mesh.devices.flat[0]),
                    devices=1,
                )
                outputs.append((number, speed, host))
                since, tokens, at = now, 0, number
        results = self._evaluate(config, held_out, state.params, frozen, len(configs))
        applied = np.asarray(state.applied)
        for i, (one, workdir) in enumerate(zip(configs, workdirs, strict=True)):
            if total - applied[i] >= config.train.max_bad_steps:
                raise UserError(
                    f"study: arm '{one.name}', seed {one.seed}: {total - applied[i]} of {total} steps gave a NaN "
                    "or Inf loss or gradient; lower optimizer.learning_rate"
                )
            workdir.mkdir(parents=True, exist_ok=True)
            own = jax.tree.map(lambda leaf, i=i: leaf[i], state)
            lines = [(number, speed, jax.tree.map(lambda leaf, i=i: leaf[i], host)) for number, speed, host in outputs]
            write_text(workdir / "data_report.json", json.dumps(drawn.reports[i], indent=1))
            self._write(one, workdir, own, drawn.positions[i], lines, *results[i])

    def _batches(self, configs: Sequence[Config], steps: int) -> Drawn:
        """Returns the batches of all steps; those of the last call are kept, for arms that differ in the adapter."""
        config = configs[0]
        key = (config.data, config.train.batch_rows, steps, tuple(one.seed for one in configs))
        if self._drawn is None or self._drawn.key != key:
            rows = config.train.batch_rows
            mixtures = [Mixture(config.data, self.loader, seed=one.seed, rows=rows) for one in configs]
            batches = [
                jax.tree.map(lambda *leaves: np.stack(leaves), *(next(mixture).arrays() for mixture in mixtures))
                for _ in range(steps)
            ]
            positions = [mixture.get_state() for mixture in mixtures]
            reports = [mixture.report(position) for mixture, position in zip(mixtures, positions, strict=True)]
            self._drawn = Drawn(key, batches, positions, reports)
            for mixture in mixtures:
                mixture.close()
        return self._drawn

    def _weights(self, spec: ModelSpec, config: Config, seeds: jax.Array) -> tuple[Tree, Tree]:
        """Returns the trainable parameters, with an axis of seeds in front, and the frozen ones."""
        abstract = spec.abstract(self.mesh, config.train.trainable, config.model.frozen_dtype)
        loaded = self.source.load(abstract)
        make = spec.maker({path: leaf for path, leaf in abstract.items() if path not in loaded})
        made = jax.jit(jax.vmap(make))(seeds)
        names = set(flatten(split_trainable(abstract, spec.declarations, config.train.trainable)[0]))
        if still := sorted(set(made) - names):
            raise UserError(f"study: the base lacks {still[0]}, which does not train; give a whole base")
        params = {
            path: made[path] if path in made else jnp.broadcast_to(loaded[path], (len(seeds), *loaded[path].shape))
            for path in names
        }
        return unflatten(params), unflatten({path: leaf for path, leaf in loaded.items() if path not in names})

    def _evaluate(self, config: Config, step, params: Tree, frozen: Tree, seeds: int) -> list[tuple[dict, dict]]:
        """Returns for each seed the tasks' results and the use of the experts by task."""
        found: list[tuple[dict, dict]] = [({}, {}) for _ in range(seeds)]
        for task in config.evaluation.tasks:
            sums = [jax.device_get(step(params, frozen, batch)) for batch in self.held_out[task.name]]
            for i, (tasks, use) in enumerate(found):
                own = [jax.tree.map(lambda leaf, i=i: leaf[i], one) for one in sums]
                tasks[task.name], counts = held_out_result(task, config.data, own)
                if counts.size:
                    use[task.name] = expert_shares(counts)
        return found

    def _write(
        self,
        config: Config,
        workdir: epath.Path,
        state: TrainState,
        position: dict[str, Any],
        lines: list[tuple[int, dict[str, float], Any]],
        tasks: dict[str, Any],
        use: dict[str, Any],
    ) -> None:
        """Writes a run's folder; the result last, since its being there means that all is."""
        assert config.train.steps is not None
        assert config.model.base is not None
        write_text(workdir / "config.json", json.dumps(config_json.to_json(config), indent=1))
        self.tokenizer.save(str(workdir))
        domains = [domain.name for domain in config.data.domains]
        with MetricsWriter(workdir, resume_step=None) as writer:
            for number, speed, host in lines:
                writer.write(number, step_metrics(host, domains) | speed)
        meta = Meta(
            architecture=self.arch,
            adapter=config.adapter,
            trained=config.train.trainable,
            prompt=config.data.prompt,
            image_aspect=config.data.image_aspect,
            base=locate(config.model.base),
            base_hash=self.base_hash,
            seed=config.seed,
        )
        checkpointer = Checkpointer(workdir, config.checkpoint)
        checkpointer.save(config.train.steps, state, position, meta, None)
        checkpointer.close()
        result = result_file(workdir, config.train.steps)
        result.parent.mkdir(parents=True, exist_ok=True)
        write_expert_use(workdir, use)
        write_text(result, json.dumps({"step": config.train.steps, "tasks": tasks}, indent=1))
