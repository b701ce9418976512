"""Several hosts: how a job begins and ends, where its processes meet, and what happens when one is gone.

In a process by itself every function here does nothing but return what was given.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from mole_jax.compat import job_client
from mole_jax.errors import UserError, print_error
from mole_jax.parallel.launch import Launch, find
from mole_jax.parallel.roll_call import call_roll
from mole_jax.parallel.settings import program_settings
from mole_jax.terminal import escaped

MEETING_SECONDS = 1800.0
"""How long processes wait for one another: the slowest may still open its data, load weights, or compile."""
_MOST_BEAT_SECONDS = 2.0
"""Between two signs of life; an eighth of the host time-out if that is less."""

_job: Job | None = None


@contextmanager
def joined(flags: argparse.Namespace, *, preemptible: bool) -> Iterator[None]:
    """Joins the job that `flags` (`launch.add_flags`) or the launcher tell of, for as long as the body runs.

    To be entered before anything touches a device. If the body raises, or another process is gone, this process
    ends with one line on stderr, and so do all others: nobody waits for a process that will not come.

    Args:
        flags: of the command line.
        preemptible: the body asks `told_to_stop` at every step; otherwise a SIGTERM ends the process at once.

    Raises:
        UserError: the flags make no sense, not all processes came in time (the message names them), or their versions
            or flags of jax differ.
    """
    global _job
    launch = find(flags)
    if launch is None:
        yield
        return
    names = call_roll(launch, flags.start_timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", preemptible)
    jax.distributed.initialize(
        launch.coordinator,
        launch.processes,
        launch.process,
        launch.devices,
        cluster_detection_method="deactivate",
        # A backstop: `_watch` is faster, and says who.
        heartbeat_timeout_seconds=max(100, int(3 * flags.host_timeout)),
    )
    _job = Job(launch, names, flags.host_timeout)
    try:
        agree("settings of jax", program_settings())  # programs that differ abort in C++, or wait for ever
        yield
    except BaseException as error:
        if not (isinstance(error, SystemExit) and _job.stopping):
            _job.fail(error)
        _job.finish()
        raise
    _job.finish()


class Job:
    """The processes, as this one sees them."""

    def __init__(self, launch: Launch, names: list[str], host_timeout: float):
        self.process, self.names, self._coordinator = launch.process, names, launch.coordinator
        self.client = job_client()
        self._timeout, self._beat = host_timeout, min(_MOST_BEAT_SECONDS, host_timeout / 8)
        self.stopping = False
        """Whether all processes agreed to leave early."""
        self.asked = 0
        """How often `told_to_stop` was asked."""
        self._turns: collections.Counter[str] = collections.Counter()
        self._heard: tuple[dict[int, str], dict[int, str]] = {}, {}
        """By process the notes of those who left, and the signs of life: as process 0 last told them."""
        self._ending, self._done = threading.Lock(), threading.Event()
        libc = ctypes.CDLL(None)
        # Where process 0 is gone, jax aborts every other process, from a thread of its own and without a word about
        # what to do. Its option jax_enable_recoverability does not help (jax 0.12.0; 2 and 4 processes on CPU): it
        # keeps the coordinator from passing on that another process failed, but the others abort within 0.2 s of the
        # coordinator's own death with it as without it. Where another process is gone, `_watch` is faster than jax's
        # heartbeat either way, so all that the option would take away is that backstop.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        libc.signal(signal.SIGABRT, self._on_abort)
        # Two threads, because a call blocks for as long as process 0 is frozen, and silence must be found out on time.
        works = {"signs": self._exchange, "watch": self._watch}
        self._threads = [threading.Thread(target=work, daemon=True, name=name) for name, work in works.items()]
        for thread in self._threads:
            thread.start()

    def called(self, process: int) -> str:
        return f"process {process} on {self.names[process]}"

    def turn(self, name: str) -> str:
        """Returns a key that is new, and the same on every process."""
        self._turns[name] += 1
        return f"mole_jax/{name}/{self._turns[name]}"

    def meet(self, key: str, name: str, value: str, timeout: float) -> None:
        """Leaves a value under `key` and waits until every process has.

        Raises:
            UserError: after `timeout` seconds somebody is missing; the message names them.
        """
        self.client.key_value_set(f"{key}/{self.process}", value)
        try:
            self.client.wait_at_barrier(key, int(1000 * timeout))
        except jax.errors.JaxRuntimeError as error:
            came = {int(found.rpartition("/")[2]) for found, _ in self.client.key_value_dir_get(key)}
            missing = [self.called(process) for process in range(len(self.names)) if process not in came]
            if not missing:
                raise
            raise UserError(
                f"{name}: after {timeout:g} s {' and '.join(missing)} had not come; look at the log there, "
                "and start the same command on all again to resume"
            ) from error

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others why this process ends, and ends it."""
        message: str = " ".join(str(error).split()) or type(error).__name__
        status = 1
        if isinstance(error, UserError):
            status = 2
            self._done.set()
            print_error(error)
        elif isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in message or "NCCL" in message:
            # Most likely because another process is gone; then `_watch` finds out and ends this one.
            who = self.called(self.process)
            print(
                f"{who}: {escaped(message):.300}; looking whether another process is gone", file=sys.stderr, flush=True
            )
            time.sleep(self._timeout + 5 * self._beat)
            traceback.print_exception(error)
        elif not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        key, note = f"mole_jax/left/{self.process}", json.dumps({"status": status, "message": message})
        leave = threading.Thread(target=lambda: self.client.key_value_set(key, note, allow_overwrite=True), daemon=True)
        leave.start()
        leave.join(self._timeout)  # a frozen process 0 would not take it
        self._end(status)

    def finish(self) -> None:
        """Waits until all processes have come to the end."""
        self.meet(self.turn("end"), "end", "", MEETING_SECONDS)
        self._done.set()
        for thread in self._threads:  # jax takes the client down at exit, which must not be under a call
            thread.join(self._timeout)

    def _exchange(self) -> None:
        """Shows that this process lives, and asks process 0, which keeps the signs of all, about the others."""
        for beat in range(sys.maxsize):
            try:
                self.client.key_value_set(f"mole_jax/alive/{self.process}", str(beat), allow_overwrite=True)
                self._heard = self._read("mole_jax/left/"), self._read("mole_jax/alive/")
            except jax.errors.JaxRuntimeError:
                pass  # `_watch` sees that nothing new comes
            if self._done.wait(self._beat):
                return

    def _read(self, folder: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in self.client.key_value_dir_get(folder)}

    def _watch(self) -> None:
        """Ends this process with one line when another does not live."""
        now, before = 0.0, time.monotonic()
        heard, last = self._heard, now
        seen: dict[int, tuple[str, float]] = dict.fromkeys(range(len(self.names)), ("", now))
        while not self._done.wait(self._beat):
            # A clock that stands while this process is frozen itself: it must not take the others for silent then.
            after = time.monotonic()
            now, before = now + min(after - before, 2 * self._beat), after
            if self._heard is not heard:
                heard, last = self._heard, now
            left, alive = heard
            for process, said in left.items():
                found = json.loads(said)
                self._stop(process, f"stopped: {found['message']}", found["status"])
            for process, sign in alive.items():
                if seen[process][0] != sign:
                    seen[process] = (sign, now)
            # Where nothing is heard from process 0, nothing is known of the others.
            silent = [process for process, (_, when) in seen.items() if last - when > self._timeout]
            for process in [0] if now - last > self._timeout else silent:
                self._stop(process, f"is gone (no sign of life for {self._timeout:g} s)", 1)

    def _stop(self, process: int, what: str, status: int) -> None:
        if process == self.process or self._done.is_set():
            return
        line = f"error: {self.called(process)} {what}; {self.called(self.process)} stops too"
        print(
            escaped(line) + ("" if status == 2 else "; the same command on all resumes the run"),
            file=sys.stderr,
            flush=True,
        )
        self._end(status)

    def _end(self, status: int) -> NoReturn:
        with self._ending:  # whoever comes second, of `fail` and `_watch`, waits for the end
            sys.stdout.flush()
            sys.stderr.flush()
            if self.process == 0:
                time.sleep(3 * self._beat)  # without it the others could not read why
            # At an ordinary exit jax would wait for the others.
            os._exit(status)

    def _aborted(self, _: int) -> None:
        host, _colon, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            line = f"error: jax ended {self.called(self.process)} (see above)"
        except OSError:
            line = f"error: {self.called(0)} is gone; {self.called(self.process)} stops too"
        os.write(2, f"{line}; the same command on all resumes the run\n".encode())
        os._exit(1)


def barrier(name: str, timeout: float = MEETING_SECONDS) -> None:
    """Waits until every process has come here.

    Raises:
        UserError: after `timeout` seconds somebody is missing; the message names them.
    """
    if _job is not None:
        _job.meet(_job.turn(name), name, "", timeout)


def gathered(name: str, value: Any) -> list[Any] | None:
    """Returns the JSON values of all processes on process 0, None on the others; all have to come here."""
    if _job is None:
        return [value]
    key = _job.turn(name)
    _job.meet(key, name, json.dumps(value), MEETING_SECONDS)
    if _job.process:
        return None
    keys = [f"{key}/{process}" for process in range(len(_job.names))]
    values = [json.loads(_job.client.blocking_key_value_get(one, 1000)) for one in keys]
    _job.client.key_value_delete(key)
    return values


def first[T](name: str, make: Callable[[], T]) -> T:
    """Returns on every process what `make` gives on process 0, a JSON value; for what must be looked up once.

    Raises:
        UserError: `make` did.
    """
    if _job is None:
        return make()
    key = _job.turn(name)
    if _job.process == 0:
        try:
            answer = {"value": make()}
        except UserError as error:
            answer = {"error": str(error)}
        _job.client.key_value_set(key, json.dumps(answer))
    answer = json.loads(_job.client.blocking_key_value_get(key, int(1000 * MEETING_SECONDS)))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same JSON `facts`.

    Raises:
        UserError: on every process, naming the first that differs from process 0 and in what.
    """
    if _job is None:
        return
    job, found = _job, gathered(what, facts)

    def difference() -> str | None:
        assert found is not None
        for process, theirs in enumerate(found):
            for name in found[0].keys() | theirs.keys():
                one, other = found[0].get(name), theirs.get(name)
                if one != other:
                    return f"{job.called(process)} has {name} {other!r}, {job.called(0)} {one!r}"
        return None

    if (line := first(what, difference)) is not None:
        raise UserError(f"{what}: {line}; start all processes with the same command, environment, version and data")


def told_to_stop() -> bool:
    """Returns whether to save and leave after this step, since some process got a SIGTERM; all find so at the same one.

    To be called once at every step, by all processes.
    """
    if _job is None:
        return False
    # Processes agree on the highest number asked so far plus one, and each has to ask for that very number. So they are
    # counted here: a run that resumes at step 1000 would never meet the 1 of a signal that came before its first step.
    _job.asked += 1
    _job.stopping = multihost_utils.reached_preemption_sync_point(_job.asked)
    return _job.stopping


def is_first() -> bool:
    """Returns whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def together() -> bool:
    """Returns whether there are several processes."""
    return _job is not None
