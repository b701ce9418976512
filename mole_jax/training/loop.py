"""The training loop, from top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
from etils import epath

from mole_jax.adapters import expert_sharding
from mole_jax.config import Config
from mole_jax.data import left_out
from mole_jax.data.batch import Batch
from mole_jax.data.left_out import LeftOut
from mole_jax.data.mixture import merged
from mole_jax.errors import UserError
from mole_jax.evaluation import report
from mole_jax.evaluation.runner import Evaluator, example_answers, result_file
from mole_jax.evaluation.tables import EVALUATION
from mole_jax.files import read_json, write_json
from mole_jax.model import attention
from mole_jax.parallel import compiled, hosts
from mole_jax.parallel.mesh import batch_shards
from mole_jax.parallel.sharding import put_batch, reader
from mole_jax.terminal import escaped
from mole_jax.training.checkpoint import Checkpointer
from mole_jax.training.prefetch import Prefetch
from mole_jax.training.progress import Progress
from mole_jax.training.setup import Run, set_up
from mole_jax.training.startup import STARTS_FILE, Startup, machine
from mole_jax.training.step import TrainState
from mole_jax.training.step_log import StepLog
from mole_jax.training.summary import format_table, trainable_table
from mole_jax.training.telemetry import MetricsWriter, record_events
from mole_jax.training.trackers.open import open_trackers
from mole_jax.weights.run import CHECKPOINTS, Damaged, read_meta
from mole_jax.workdir import claimed

TERMINATED = 143
"""Exit status after a SIGTERM that was answered by saving (128 + 15, as a shell would say)."""


def train(config: Config, workdir: epath.Path) -> None:
    """Trains to the end, or from the newest checkpoint of `workdir` to the end.

    Raises:
        UserError: config, data, base, mesh or workdir do not fit; or too many steps in a row gave NaN or Inf.
        SystemExit: with status 143 after a SIGTERM, once the state is saved.
    """
    with claimed(workdir) if hosts.is_first() else nullcontext():
        _train(config, workdir)


def _train(config: Config, workdir: epath.Path) -> None:
    startup = Startup()
    run = set_up(config, workdir, lap=startup.lap)
    checkpointer = Checkpointer(workdir, config.checkpoint)
    start, state, said = resume(run, checkpointer)
    with Progress(run.total_steps, start, show=hosts.is_first()) as progress, recorder(run, start, progress) as writer:
        for note in (*run.unchecked, *said):
            progress.say(note)
        startup.lap("checkpoints")
        introduce(run, start, progress)
        with ThreadPoolExecutor(1) as pool, Prefetch(run.mixture) as batches:
            lowered = lower_step(run, state, batches.first()) if start < run.total_steps else None
            looked_at = pool.submit(run.mixture.survey)  # XLA compiles meanwhile and needs no Python, as tracing does
            program: Any = None
            if lowered is not None:
                program = lowered.compile()
                startup.lap("compilation")
            tell_left_out(run, looked_at.result, progress)
            startup.lap("look at records")
            if start == 0 and config.evaluation.at_start:
                evaluate(run, 0, state, progress, writer, generate=config.evaluation.generate)
                startup.lap("evaluation")
            log = StepLog(run, writer, progress)
            step, stop, sound = start, False, True
            with sigterm() as terminated:
                for step in range(start + 1, run.total_steps + 1):
                    with log.waiting_for_data():
                        batch, position = next(batches)
                    arrays = put_batch(batch.arrays(), run.mesh)
                    with jax.set_mesh(run.mesh), jax.transfer_guard("disallow"):
                        state, output = program(state, run.frozen, arrays)
                    if step == start + 1:
                        jax.block_until_ready(output)
                        startup.lap("first step")
                        progress.say(f"{startup}; {compiled.told()}")
                        if hosts.is_first():
                            record_events(workdir / STARTS_FILE, step, [machine() | startup.parts | compiled.counts()])
                    log.add(step, batch, output)
                    last, held_out = step == run.total_steps, None
                    if last or (config.evaluation.every and step % config.evaluation.every == 0):
                        log.flush()
                        held_out = evaluate(
                            run, step, state, progress, writer, generate=last and config.evaluation.generate
                        )
                        log.restart_clock()
                    stop = terminated() or log.too_many_bad_steps
                    if log.too_many_bad_steps or (last and held_out is None):
                        sound = gives_numbers(run, state, batch)
                    if sound and (stop or last or step % config.checkpoint.every == 0):
                        log.flush()
                        if writer is not None:
                            writer.flush()  # a bucket's metrics are written in pieces, and must not lag the checkpoint
                        save(run, checkpointer, step, state, position=position, held_out=held_out)
                    if stop:
                        break
        checkpointer.close()

        log.check(step, int(state.applied), sound=sound)
        if stop:
            progress.say(f"stopped by SIGTERM at step {step}; the same command resumes from there")
            sys.exit(TERMINATED)
        if not hosts.first("finished", result_file(workdir, run.total_steps).exists):
            # A kill came between the last checkpoint and this.
            evaluate(run, run.total_steps, state, progress, writer, generate=config.evaluation.generate)
    if hosts.is_first():
        finish(run, progress)


@contextmanager
def recorder(run: Run, start: int, progress: Progress) -> Iterator[MetricsWriter | None]:
    """Opens metrics.jsonl and the trackers for the steps after `start`, on the first process alone."""
    if not hosts.is_first():
        yield None
        return
    trackers = open_trackers(run.config, run.workdir, start, functools.partial(progress.say, warn=True))
    with MetricsWriter(run.workdir, start, trackers) as writer:
        yield writer


def resume(run: Run, checkpointer: Checkpointer) -> tuple[int, TrainState, list[str]]:
    """Returns the step and the state to start from, and what is to be said; brings the mixture there.

    In a new run that is step 0. A damaged checkpoint is set aside and told of, and the one before it taken.

    Raises:
        UserError: the base is another one, no checkpoint is whole, or the disk has no room for one.
    """
    steps = hosts.first("checkpoints", checkpointer.steps) or []
    for step in steps:
        try:
            check_same_base(run, step)
            state, position = checkpointer.restore(step, run.state)
            said = [line for line in (go_to(run, step, position), other_masks(run, step)) if line]
        except Damaged as error:
            hosts.barrier("damaged checkpoint")
            if hosts.is_first():
                aside = checkpointer.set_aside(step)
                line = (
                    f"warning: {checkpointer.folder / str(step)} is damaged, now {aside.name}: {escaped(error.reason)}"
                )
                print(line, file=sys.stderr)
            hosts.barrier("checkpoint set aside")
            continue
        checkpointer.prune()
        checkpointer.check_room(state)
        return step, state, said
    if steps:
        raise UserError(
            f"{checkpointer.folder}: none of its {len(steps)} checkpoints is whole; they are kept as STEP.damaged; "
            "choose another --workdir to begin anew"
        )
    checkpointer.check_room(run.state)
    return 0, run.state, []


def go_to(run: Run, step: int, position: dict[str, Any]) -> str | None:
    """Brings the mixture to the position saved at `step` and returns what to say.

    Raises:
        Damaged: the position makes no sense.
    """
    try:
        return run.mixture.set_state(position)
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(run.workdir / CHECKPOINTS / str(step), f"its data position lacks {error}") from error


def check_same_base(run: Run, step: int) -> None:
    """Raises `UserError` if checkpoint `step` was trained on another base, `Damaged` if it cannot be read."""
    meta = read_meta(run.workdir, step)
    before = meta.base_hash
    if before != run.meta.base_hash:
        raise UserError(
            f"{run.workdir}: was trained on another base than {run.config.model.base} now holds (hash {before[:12]}… "
            f"expected, {run.meta.base_hash[:12]}… found); put the original base back"
        )
    if meta.quantised != run.meta.quantised:
        raise UserError(
            f"{run.workdir}: was trained on a base {of_kind(meta.quantised)}, model.frozen_dtype "
            f"{run.config.model.frozen_dtype} has it {of_kind(run.meta.quantised)}; put model.frozen_dtype back"
        )


def of_kind(quantised: str | None) -> str:
    return "in floats" if quantised is None else f"in {quantised}"


def other_masks(run: Run, step: int) -> str | None:
    """Returns what to say if the version that wrote checkpoint `step` drew dropout's masks in another way."""
    if run.config.adapter.dropout == 0 or read_meta(run.workdir, step).masks == run.meta.masks:
        return None
    return (
        f"checkpoint {step} is of a version that drew dropout's masks in another way: from here on they are not those "
        "that it would have drawn"
    )


def introduce(run: Run, start: int, progress: Progress) -> None:
    """Says what is about to happen: what trains, on what, from where."""
    trained = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    frozen = sum(parameter.size for parameter in run.spec.declarations.values()) - trained
    config, shape = run.config, ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    adapter = config.adapter
    kind = {"none": "no adapters", "lora": f"LoRA r={adapter.rank}"}.get(
        adapter.kind, f"MoLE E={adapter.experts} r={adapter.rank}, router gradient {adapter.router_gradient}"
    )
    for line in format_table(trainable_table(run.spec.declarations, config.train.trainable)).split("\n"):
        progress.say(line)
    progress.say(f"{config.name}: {kind}; {trained:,} trainable and {frozen:,} frozen numbers")
    progress.say(
        f"{run.mesh.devices.size} x {run.mesh.devices.flat[0].device_kind} ({shape}); "
        f"{run.total_steps} steps of {config.train.batch_rows} rows x {config.data.sequence_length} tokens; "
        f"{'from step ' + str(start) if start else 'a new run'} in {run.workdir}"
    )
    progress.say(f"attention: {attention.described(config.model.attention, run.spec.arch.decoder.head_dim)}")
    if (kept := compiled.folder()) is not None:
        progress.say(f"compiled programs are kept in {kept} (--no-compilation-cache: not)")
    sharing, tensor = run.mesh.shape["expert"], run.mesh.shape["tensor"]
    if sharing > 1:
        tokens = config.train.batch_rows * config.data.sequence_length
        decoder, pieces = run.spec.arch.decoder, batch_shards(run.mesh) * config.train.accumulation
        share = (decoder.width, decoder.mlp_width // tensor, tokens // pieces, sharing)
        progress.say(expert_sharding.explain(adapter, *share, config.model.compute_dtype))
    progress.say(f"data: {'; '.join(filter(None, (one.remark for one in run.mixture.loader.sources)))}")
    (read, shards), (_, readers) = run.mixture.shards, reader(run.mesh)
    if readers > 1:
        more = f"; more than a {readers}th, which data.shards {readers} would be" if read * readers > shards else ""
        progress.say(f"{jax.process_count()} processes; each reads {read} of {shards} shards of the data{more}")


def tell_left_out(run: Run, survey: Callable[[], list[LeftOut]], progress: Progress) -> None:
    """Says what will be left out of each domain.

    Raises:
        UserError: it is more than `data.most_skipped`.
    """
    surveyed = hosts.first("left out", lambda: [dataclasses.asdict(one) for one in survey()])
    domains = [LeftOut(**one) for one in surveyed]
    for text, notable in left_out.lines(domains, begin="records looked at"):
        progress.say(text, warn=notable)
    left_out.check(domains, run.config.data.most_skipped)


def evaluate(
    run: Run, step: int, state: TrainState, progress: Progress, writer: MetricsWriter | None, *, generate: bool
) -> float | None:
    """Evaluates the state after `step` unless that is done; returns the mean held-out loss over tasks."""
    config = run.config
    if not config.evaluation.tasks:
        return None
    file, again = result_file(run.workdir, step), "delete it to have it made again"
    result = hosts.first("evaluated", lambda: read_json(file, EVALUATION, remedy=again) if file.exists() else None)
    if result is None:
        evaluator = Evaluator(
            config=config,
            arch=run.spec.arch,
            graph=run.spec.graph,
            mesh=run.mesh,
            tokenizer=run.tokenizer,
            step=run.evaluation_step,
        )
        result = evaluator.run(run.workdir, step, state.params, run.frozen, generate=generate)
    if writer is not None:
        writer.evaluation(step, result, example_answers(file, result, config.track.examples))
    for name, task in result["tasks"].items():
        score = "" if task["score"] is None else f", {task['metric']} {100 * task['score']:.1f} %"
        progress.say(f"step {step}: {name}: held-out loss {task['loss']:.3f}{score}")
        if task.get("skipped"):
            progress.say(f"step {step}: {(skipped := left_out.of_task(name, task))}", warn=skipped.notable)
    return sum(task["loss"] for task in result["tasks"].values()) / len(result["tasks"])


def gives_numbers(run: Run, state: TrainState, batch: Batch) -> bool:
    """Tells whether the model's loss on a few rows is finite: no later step shows it, and finite numbers can overflow.

    One row a device is enough, and does not need the memory that the whole batch would without its pieces.
    """
    rows = batch_shards(run.mesh) // reader(run.mesh)[1]
    few = put_batch({name: array[:rows] for name, array in batch.arrays().items()}, run.mesh)
    with jax.set_mesh(run.mesh):
        sums = jax.device_get(run.evaluation_step(state.params, run.frozen, few))
    return bool(np.isfinite(sums.losses).all())


def finish(run: Run, progress: Progress) -> None:
    """Tells what was left out, and writes the report."""
    found = left_out.of_report(report.read_run(run.workdir).data_report)
    for text, notable in left_out.lines(found, begin="records read"):
        progress.say(text, warn=notable)
    page = report.write_report(run.workdir)
    print(report.summary_table(run.workdir))
    print(f"report: {page}")


def save(
    run: Run,
    checkpointer: Checkpointer,
    step: int,
    state: TrainState,
    position: dict[str, Any],
    held_out: float | None,
) -> None:
    """Saves the state after `step` with the data position of all hosts, and what was drawn so far.

    Raises:
        UserError: more of a domain was left out than `data.most_skipped` allows.
    """
    positions = hosts.gathered("checkpoint", position)
    whole = merged(positions) if positions else {}  # only the first process writes it
    checkpointer.save(step, state, whole, run.meta, held_out)
    drawn = run.mixture.report(whole, run.config.train.loss_average) if hosts.is_first() else {}
    if hosts.is_first():
        write_json(run.workdir / "data_report.json", drawn)
    if (most := run.config.data.most_skipped) is not None:
        try:
            hosts.first("left out", lambda: left_out.check(left_out.of_report(drawn), most))
        except UserError:
            checkpointer.close()  # what was trained is kept: a higher limit resumes from here
            raise


def lower_step(run: Run, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """Traces the training step for batches like this one, ready to be compiled.

    Raises:
        UserError: the processes are about to run different steps, which would wait for ever.
    """
    with jax.set_mesh(run.mesh):
        lowered = run.step.lower(state, run.frozen, put_batch(batch.arrays(), run.mesh))
    if hosts.together():
        program = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12]
        hosts.agree("training step", {"compiled program of hash": program})
    return lowered


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function to be asked after every step: has a SIGTERM come, so that the loop should save and leave?"""
    if hosts.together():
        yield hosts.told_to_stop
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)
