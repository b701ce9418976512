"""What the host learns of each step, one step late so that the device never waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from mole_jax.data.batch import Batch
from mole_jax.errors import UserError
from mole_jax.parallel import hosts
from mole_jax.parallel.devices import peak_flops, peak_memory
from mole_jax.parallel.sharding import reader
from mole_jax.terminal import shortened
from mole_jax.training.flops import step_flops
from mole_jax.training.progress import Progress
from mole_jax.training.routing_watch import RoutingWatch
from mole_jax.training.setup import Run
from mole_jax.training.summary import speed_metrics, step_metrics
from mole_jax.training.telemetry import METRICS_FILE, MetricsWriter, record_events

BAD_STEPS_FILE = "bad_steps.jsonl"


class StepLog:
    """Reads each step's metrics when the next one is under way; reports steps that were not applied.

    `writer` is None on all processes but the first. `sharing` is the number of runs that the device steps at once: each
    has its part of the time.
    """

    def __init__(self, run: Run, writer: MetricsWriter | None, progress: Progress, *, sharing: int = 1):
        self._run, self._writer, self._progress, self._sharing = run, writer, progress, sharing
        self._domains = [domain.name for domain in run.config.data.domains]
        self._flops = step_flops(run.config, run.spec.arch, run.spec.declarations, run.config.train.trainable)
        self._peak = peak_flops(run.mesh.devices.flat[0])
        self._pending: tuple[int, Batch, Mapping[str, Any]] | None = None
        self._bad_in_a_row, self._update_alone_bad = 0, False
        self._readers = reader(run.mesh)[1]
        # Routed by domain there is no router to watch.
        watched = run.config.adapter.kind == "mole" and run.config.adapter.route_by != "domain"
        self._watch = RoutingWatch(run.config, run.workdir, progress.say) if watched and writer is not None else None
        if writer is not None and len(writer.missing) >= run.config.train.log_every:
            steps = f"{writer.missing[0]} to {writer.missing[-1]}"
            progress.say(f"{run.workdir / METRICS_FILE}: has no lines of steps {steps}; they are lost", warn=True)
        self.restart_clock()

    @property
    def too_many_bad_steps(self) -> bool:
        return self._bad_in_a_row >= self._run.config.train.max_bad_steps

    def check(self, step: int, applied: int, *, sound: bool) -> None:
        """Checks a run that has ended after `step` with so many updates `applied`; a `sound` model gives numbers.

        Raises:
            UserError: too many bad steps in a row have ended it, all of its steps were bad, or the model gives NaN.
        """
        config, workdir, total = self._run.config, self._run.workdir, self._run.total_steps
        if self.too_many_bad_steps:
            mend = (
                f"look at them; the same command goes on behind them; to {self._remedy()} needs a new --workdir"
                if sound
                else f"the model itself gives NaN or Inf by now and is not saved; {self._remedy()} in a new --workdir"
            )
            raise UserError(
                f"{config.train.max_bad_steps} steps in a row up to step {step} gave a NaN or Inf loss, gradient or "
                f"update and were not applied (records in {workdir / BAD_STEPS_FILE}); {mend}"
            )
        if step == total and total and not applied:
            raise UserError(
                f"{workdir}: not one of {total} steps could be applied, each gave a NaN or Inf loss, gradient or "
                f"update ({BAD_STEPS_FILE}); {self._remedy()} and choose another --workdir"
            )
        if not sound:
            raise UserError(
                f"{workdir}: the model gives NaN or Inf after step {step}, though its parameters are finite, and is "
                f"not saved; {self._remedy()} and choose another --workdir"
            )

    def _remedy(self) -> str:
        """What can help against the last bad step, or a model that overflows."""
        optimizer = self._run.config.optimizer
        if self._update_alone_bad and not optimizer.eps:
            return "raise optimizer.eps, which is 0"
        rates = "lower optimizer.learning_rate or optimizer.weight_decay"
        return rates if self._update_alone_bad else f"{rates}, or set model.compute_dtype float32"

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def restart_clock(self) -> None:
        """Leaves out of the speed what was done since the last step was recorded."""
        self._since, self._waited, self._tokens, self._steps = time.perf_counter(), 0.0, 0, 0

    def add(self, step: int, batch: Batch, output: Mapping[str, Any]) -> None:
        """Takes the output of a step just dispatched and reads that of the one before."""
        self.flush()
        self._pending = step, batch, output

    def flush(self) -> None:
        """Waits for the step that is pending, if there is one, and records it."""
        if self._pending is None:
            return
        step, batch, output = self._pending
        self._pending = None
        host = jax.device_get(output)
        self._steps += 1
        self._tokens += int(np.count_nonzero(batch.segment_ids)) * self._readers
        self._bad_in_a_row = 0 if host["finite"] else self._bad_in_a_row + 1
        if not host["finite"]:
            self._update_alone_bad = bool(np.isfinite(host["total_loss"]) and np.isfinite(host["grad_norm"]))
            self._report_bad(step, batch, host)
        elif self._watch is not None:
            self._watch.add(step, host["sums"].use)
        if step % self._run.config.train.log_every and step != self._run.total_steps:
            return
        now = time.perf_counter()
        metrics = step_metrics(host, self._domains) | speed_metrics(
            seconds=(now - self._since) / self._sharing,
            steps=self._steps,
            waited=self._waited,
            tokens=self._tokens,
            flops=self._flops,
            peak_flops=self._peak,
            devices=self._run.mesh.devices.size,
            memory=peak_memory(jax.local_devices()[0]),
        )
        self.restart_clock()
        if self._writer is not None:
            self._writer.write(step, metrics)
            if self._watch is not None and self._pictured(step):
                self._watch.draw(step, self._writer)
        self._progress.update(step, metrics)

    def _pictured(self, step: int) -> bool:
        """Returns whether this recorded step is the last one, or the first since a checkpoint was due."""
        config = self._run.config
        return step % config.checkpoint.every < config.train.log_every or step == self._run.total_steps

    def _report_bad(self, step: int, batch: Batch, host: Mapping[str, Any]) -> None:
        found = hosts.gathered("bad step", [record for row in batch.record_ids for record in row])
        if found is None:
            return
        records = [record for part in found for record in part]
        shown = ", ".join(map(shortened, records[:8])) + (" …" if len(records) > 8 else "")
        self._progress.say(
            f"step {step}: loss {host['total_loss']}, gradient norm {host['grad_norm']}: these or the update are not "
            f"all finite; not applied ({self._bad_in_a_row} in a row). Records: {shown}"
        )
        event = {"loss": str(host["total_loss"]), "grad_norm": str(host["grad_norm"]), "records": records}
        record_events(self._run.workdir / BAD_STEPS_FILE, step, [event])
