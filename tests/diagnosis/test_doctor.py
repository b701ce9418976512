"""`doctor`: a healthy machine, a perturbed path, eight devices, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mole_jax import doctor
from mole_jax.adapters import grouping
from mole_jax.diagnosis import kernels, machine
from mole_jax.diagnosis.finding import Finding, table
from mole_jax.model import attention
from tests import tiny
from tests.parallel.test_launch import address

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}
COMMAND = [sys.executable, "-m", "mole_jax.doctor", "--json"]


def states(text: str) -> dict[str, str]:
    return {one["check"]: one["state"] for one in json.loads(text)["findings"]}


@pytest.mark.slow
def test_a_kernel_with_wrong_values_is_wrong_and_so_is_the_status(monkeypatch, capsys):
    real = attention._KERNELS["blocks"]
    monkeypatch.setitem(
        attention._KERNELS, "blocks", lambda *arrays, causal: (1.05 * real(*arrays, causal=causal)).astype("bfloat16")
    )
    monkeypatch.setattr(sys, "argv", ["doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 1
    found = states(capsys.readouterr().out)
    assert found["attention blocks"] == "wrong"


@pytest.mark.slow
def test_a_path_with_right_values_and_wrong_gradients_is_wrong(monkeypatch):
    real = grouping.grouped
    monkeypatch.setattr(grouping, "grouped", lambda *a, all_gates, **k: real(*a, all_gates=False, **k))
    found = {one.check: one.state for one in kernels.expert_paths()}
    assert found["experts grouped"] == "wrong"


def test_a_kernel_that_fails_or_gives_other_numbers_is_wrong(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no such instruction")

    def not_numbers(*arrays, causal):
        return attention._KERNELS["xla"](*arrays, causal=causal) * float("nan")

    real = attention._KERNELS["blocks"]

    def too_large(*arrays, causal):
        return (1.05 * real(*arrays, causal=causal)).astype("bfloat16")

    for kernel, told in (
        (too_large, "error 4."),
        (fails, "fails: RuntimeError: no such instruction"),
        (not_numbers, "error nan"),
    ):
        monkeypatch.setitem(attention._KERNELS, "blocks", kernel)
        (one,) = [one for one in kernels.attention_paths() if one.check == "attention blocks"]
        assert one.state == "wrong"
        assert one.found.startswith(told)


def test_another_version_is_told_with_what_to_install():
    rows = [*machine.versions(["numpy<1", "no-such-package>=2", 'jax<0; extra == "x"', "jax>=0.1"])]
    assert [one.advice for one in rows] == ["pip install 'numpy<1'", "pip install 'no-such-package>=2'"]
    assert rows[1].found == "absent"


def test_each_row_that_is_off_has_a_line_of_advice():
    lines = "\n".join(table([Finding("a", "1"), Finding("b", "2", "off", "do this")])).splitlines()
    assert lines[-1] == "off: b: do this"
    assert len(lines) == 5


@pytest.mark.slow
def test_eight_devices_and_a_mesh_of_three_axes(tmp_path):
    (tmp_path / "config.yaml").write_text("base: quickstart\nmesh: {data: 2, fsdp: 2, tensor: 2}\n")
    done = subprocess.run(
        [*COMMAND, "--config", str(tmp_path / "config.yaml"), "--workdir", str(tmp_path / "run")],
        env=ENVIRONMENT | {"XLA_FLAGS": f"{tiny.CHILD_FLAGS} --xla_force_host_platform_device_count=8"},
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = states(done.stdout)
    assert {"mesh.data 2", "mesh.fsdp 2", "mesh.tensor 2", "checkpoint"} <= found.keys()
    assert {"experts over devices, gather", "experts over devices, all_to_all"} <= found.keys()
    assert {found[name] for name in found if name.startswith(("attention", "experts", "checkpoint"))} == {"ok"}
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.slow
def test_two_processes_tell_what_each_found(tmp_path):
    place = ["--coordinator", address(), "--processes", "2", "--workdir", str(tmp_path), "--process"]
    both = [
        subprocess.Popen(
            [*COMMAND, *place, str(number)],
            env=ENVIRONMENT | {"XLA_FLAGS": tiny.CHILD_FLAGS},
            cwd=tiny.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    (out, error), (nothing, _) = [one.communicate(timeout=200) for one in both]
    assert [one.returncode for one in both] == [0, 0], error
    assert "findings" not in nothing
    found = states(out.splitlines()[-1])  # Gloo tells of its connections before
    for number in range(2):
        assert found[f"experts over devices, all_to_all (process {number})"] == "ok"
        assert found[f"mesh.data 2 (process {number})"] == "ok"
        assert found[f"checkpoint (process {number})"] == "ok"
