"""The first meeting of a job's processes, which can say who is missing. (jax's own aborts without a name.)"""

from __future__ import annotations

import errno
import json
import secrets
import socket
import time
from typing import Any

from mole_jax.errors import UserError
from mole_jax.parallel.launch import Launch

_RETRY_SECONDS = 0.2
_ANSWER_SECONDS = 10.0
"""How long a process that has connected may take to say who it is."""


def call_roll(launch: Launch, timeout: float) -> list[str]:
    """Waits until every process has called in at the coordinator's address; the port is free again afterwards.

    Returns:
        The name of each process's host.

    Raises:
        UserError: after `timeout` seconds somebody is missing, who is named; two processes have one number; or the
            coordinator's port is in use.
    """
    me = {
        "process": launch.process,
        "processes": launch.processes,
        "host": socket.gethostname(),
        "token": secrets.token_hex(8),  # tells two processes of one host apart, and one that calls again from another
    }
    end = time.monotonic() + timeout
    answer = (_ask if launch.process else _answer)(launch, me, end, timeout)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["hosts"]


def _answer(launch: Launch, me: dict[str, Any], end: float, timeout: float) -> dict[str, Any]:
    """Process 0: collects the others and tells all of them how it went."""
    port = int(launch.coordinator.rpartition(":")[2])
    present, connections = {0: me["host"]}, []
    tokens = {0: me["token"]}
    answer: dict[str, Any] = {}
    try:
        server = socket.create_server(("", port), backlog=launch.processes)
    except OSError as error:
        return _port_taken(port, me, error) or {
            "error": f"coordinator {launch.coordinator}: cannot open the port ({error}); choose a free one"
        }
    with server:
        while not answer and len(present) < launch.processes:
            if (left := end - time.monotonic()) <= 0:
                answer = {"error": _absent(launch, present, timeout)}
                break
            server.settimeout(left)
            try:
                connection = server.accept()[0]
                connection.settimeout(_ANSWER_SECONDS)
                found = _receive(connection)
                number, processes, host = int(found["process"]), int(found["processes"]), str(found["host"])
                token = str(found["token"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nobody, or somebody who is not of this job
            connections.append(connection)
            if processes != launch.processes:
                count = f"process {number} on {host} expects {processes} processes"
                answer = {"error": f"{count}, process 0 on {me['host']} {launch.processes}; start all with one number"}
            elif tokens.setdefault(number, token) != token:
                where = f"both on {host}" if present[number] == host else f"on {present[number]} and {host}"
                answer = {
                    "error": f"two processes have number {number} ({where}); number them from 0 to "
                    f"{launch.processes - 1}, each once"
                }
            present[number] = host
        answer = answer or {"hosts": [present[number] for number in range(launch.processes)]}
        for connection in connections:
            try:
                connection.sendall(json.dumps(answer).encode() + b"\n")
                connection.recv(1)  # until the other side has closed, so that the port is not kept waiting
            except OSError:
                pass
            connection.close()
    return answer


def _port_taken(port: int, me: dict[str, Any], error: OSError) -> dict[str, Any] | None:
    """Calls in as a second process 0 where the port is in use; returns the answer of the first if it is one."""
    if error.errno != errno.EADDRINUSE:
        return None
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_SECONDS) as connection:
            connection.sendall(json.dumps(me).encode() + b"\n")
            answer = _receive(connection)
    except (OSError, ValueError):
        return None
    return answer if "error" in answer else None


def _ask(launch: Launch, me: dict[str, Any], end: float, timeout: float) -> dict[str, Any]:
    """The others: call in until process 0 answers."""
    host, _, port = launch.coordinator.rpartition(":")
    reached = False
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                reached = True
                connection.sendall(json.dumps(me).encode() + b"\n")
                # Process 0 may have begun later, and says who is missing when its own time is over.
                connection.settimeout(left + timeout)
                return _receive(connection)
        except (OSError, ValueError):
            time.sleep(_RETRY_SECONDS)
    what, advice = "no answer", "look at its log, and whether this host reaches it"
    if reached:
        what = "what listens gives no answer"
        advice = f"it is frozen, another program, or a job that began with another process {launch.process}"
    return {"error": f"process 0 is missing: {what} at {launch.coordinator} within {timeout:g} s; {advice}"}


def _receive(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile() as lines:
        found = json.loads(lines.readline())
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def _absent(launch: Launch, present: dict[int, str], timeout: float) -> str:
    absent = [str(number) for number in range(launch.processes) if number not in present]
    there = ", ".join(f"{number} on {host}" for number, host in sorted(present.items()))
    return (
        f"{'process' if len(absent) == 1 else 'processes'} {', '.join(absent)} of {launch.processes} did not come to "
        f"{launch.coordinator} within {timeout:g} s (there: {there}); look at their logs, and whether they reach it"
    )
