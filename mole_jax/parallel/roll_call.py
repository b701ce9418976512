"""The first meeting of a job's processes, which can say who is missing. (jax's own aborts without a name.)"""

from __future__ import annotations

import json
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
        UserError: after `timeout` seconds somebody is missing, who is named; or two processes have one number.
    """
    me = {"process": launch.process, "processes": launch.processes, "host": socket.gethostname()}
    end = time.monotonic() + timeout
    answer = (_ask if launch.process else _answer)(launch, me, end, timeout)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["hosts"]


def _answer(launch: Launch, me: dict[str, Any], end: float, timeout: float) -> dict[str, Any]:
    """Process 0: collects the others and tells all of them how it went."""
    port = int(launch.coordinator.rpartition(":")[2])
    present, connections = {0: me["host"]}, []
    answer: dict[str, Any] = {}
    try:
        server = socket.create_server(("", port), backlog=launch.processes)
    except OSError as error:
        raise UserError(
            f"coordinator {launch.coordinator}: cannot open the port ({error}); choose a free one"
        ) from None
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
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nobody, or somebody who is not of this job
            connections.append(connection)
            if processes != launch.processes:
                count = f"process {number} on {host} expects {processes} processes"
                answer = {"error": f"{count}, process 0 on {me['host']} {launch.processes}; start all with one number"}
            elif present.get(number, host) != host:
                answer = {"error": f"two processes have number {number} (on {present[number]} and {host}); number them"}
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


def _ask(launch: Launch, me: dict[str, Any], end: float, timeout: float) -> dict[str, Any]:
    """The others: call in until process 0 answers."""
    host, _, port = launch.coordinator.rpartition(":")
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                connection.sendall(json.dumps(me).encode() + b"\n")
                # Process 0 may have begun later, and says who is missing when its own time is over.
                connection.settimeout(left + timeout)
                return _receive(connection)
        except (OSError, ValueError):
            time.sleep(_RETRY_SECONDS)
    return {
        "error": f"process 0 is missing: no answer at {launch.coordinator} within {timeout:g} s; "
        "look at its log, and whether this host reaches it"
    }


def _receive(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile() as lines:
        return json.loads(lines.readline())


def _absent(launch: Launch, present: dict[int, str], timeout: float) -> str:
    absent = [str(number) for number in range(launch.processes) if number not in present]
    there = ", ".join(f"{number} on {host}" for number, host in sorted(present.items()))
    return (
        f"{'process' if len(absent) == 1 else 'processes'} {', '.join(absent)} of {launch.processes} did not come to "
        f"{launch.coordinator} within {timeout:g} s (there: {there}); look at their logs, and whether they reach it"
    )
