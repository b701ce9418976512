"""Who takes part in a job, and the roll call: flags, launchers, and the names of those who are missing."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import socket
import threading
from typing import Any

import pytest

from mole_jax.errors import UserError
from mole_jax.parallel import launch
from mole_jax.parallel.launch import Launch
from mole_jax.parallel.roll_call import call_roll

HOST = socket.gethostname()


def address() -> str:
    """A free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def found(*flags: str) -> Launch | None:
    parser = argparse.ArgumentParser()
    launch.add_flags(parser)
    return launch.find(parser.parse_args(flags))


@pytest.fixture
def alone(monkeypatch):
    """An environment without any launcher."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JOB_", "JAX_COORD", "MOLE_JAX_")):
            monkeypatch.delenv(name)
    return monkeypatch


SLURM = {"SLURM_JOB_ID": "4096", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}


def test_a_process_by_itself_joins_nothing(alone):
    assert found() is None
    assert found("--coordinator", "here:1234", "--processes", "1", "--process", "0") is None
    for name, value in (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a7"}).items():
        alone.setenv(name, value)
    assert found() is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        # The first of the nodes, and jax's port for a job whose number is a multiple of 4096.
        (SLURM | {"SLURM_STEP_NODELIST": "a[07-10],b1"}, Launch("a07:61440", 4, 2, (0,))),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.7,10.1.0.7:34911",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            Launch("10.0.0.7:61441", 2, 1, (1,)),
        ),
        (
            {"MOLE_JAX_COORDINATOR": "h:12", "MOLE_JAX_PROCESSES": "3", "MOLE_JAX_PROCESS": "0"},
            Launch("h:12", 3, 0, None),
        ),
    ],
)
def test_launchers_and_the_environment_are_understood(alone, variables, expected):
    for name, value in variables.items():
        alone.setenv(name, value)
    assert found() == expected
    mine = ("--coordinator", "mine:1", "--processes", "9", "--process", "8")
    assert found(*mine) == Launch("mine:1", 9, 8, None), "flags win"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--processes", "2"), "--coordinator and --process not given; give --coordinator, --processes and --process"),
        (
            ("--coordinator", "h:1", "--processes", "2", "--process", "2"),
            "--process is 2, with --processes 2 it is 0 to 1",
        ),
        (("--coordinator", "h:1", "--processes", "0", "--process", "0"), "--processes is 0"),
        (("--coordinator", "h", "--processes", "2", "--process", "0"), "--coordinator expects HOST:PORT, got 'h'"),
        (("--host-timeout", "0"), "--host-timeout is 0, it must be over 0"),
    ],
)
def test_half_a_set_of_flags_is_refused(alone, flags, message):
    with pytest.raises(UserError, match="^" + re.escape(message)) as caught:
        found(*flags)
    assert "\n" not in str(caught.value)


def test_a_job_in_kubernetes_that_cannot_find_itself_is_refused(alone):
    """Alone, each pod would train and write into the same folder."""
    alone.setenv("JOB_COMPLETION_INDEX", "0")
    with pytest.raises(UserError, match="install the package kubernetes"):
        found()


def roll(launches, timeout) -> list[Any]:
    """Calls the roll as each of the `launches`, at once; returns their answers or errors."""

    def call(one):
        try:
            return call_roll(one, timeout)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(launches)) as pool:
        return list(pool.map(call, launches))


def test_the_roll_is_called():
    place = address()
    assert roll([Launch(place, 3, i, None) for i in range(3)], 20) == [[HOST] * 3] * 3
    # The port is free again, for jax.
    socket.create_server(("", int(place.partition(":")[2]))).close()


def test_the_roll_names_who_is_missing():
    place = address()
    for line in roll([Launch(place, 4, i, None) for i in (0, 2)], 1):
        assert line.startswith(
            f"processes 1, 3 of 4 did not come to {place} within 1 s (there: 0 on {HOST}, 2 on {HOST})"
        )
    (line,) = roll([Launch(place, 2, 1, None)], 1)
    assert line.startswith(f"process 0 is missing: no answer at {place} within 1 s")


def test_the_roll_finds_another_count():
    place = address()
    for line in roll([Launch(place, 2, 0, None), Launch(place, 3, 1, None)], 20):
        assert line.startswith(f"process 1 on {HOST} expects 3 processes, process 0 on {HOST} 2")


def test_the_roll_finds_two_processes_of_one_number_on_one_host():
    place = address()
    for line in roll([Launch(place, 3, 0, None), *[Launch(place, 3, 1, None)] * 2], 20):
        assert line == f"two processes have number 1 (both on {HOST}); number them from 0 to 2, each once"


def test_the_roll_finds_a_second_process_0():
    place = address()
    for line in roll([Launch(place, 2, 0, None)] * 2, 20):
        assert line == f"two processes have number 0 (both on {HOST}); number them from 0 to 1, each once"


def test_a_port_of_another_program_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        threading.Thread(target=lambda: server.accept()[0].sendall(b"3\n"), daemon=True).start()
        (line,) = roll([Launch(place, 2, 0, None)], 20)
        assert line.startswith(f"coordinator {place}: cannot open the port (")
        (line,) = roll([Launch(place, 2, 1, None)], 1)
        assert line.startswith(
            f"process 0 is missing: what listens gives no answer at {place} within 1 s; it is frozen"
        )
