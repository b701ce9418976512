"""A run whose workdir, data and base are on gs://, against an emulator of the service on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import tiny

pytestmark = pytest.mark.slow

BUCKET = "gs://mole-bucket"
SERVER = """
import sys, time
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

plain = objects.download

def download(request, response, storage, *args, **kwargs):
    # The service names the generation of what it sends, and tensorstore insists on that; the emulator leaves it out.
    try:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]
    except objects.NotFound:
        pass
    return plain(request, response, storage, *args, **kwargs)

objects.download = download
for _, handlers in server.HANDLERS:
    handlers.update({method: download for method, handler in handlers.items() if handler is plain})
server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="mole-bucket").start()
print("up", flush=True)
time.sleep(3600)
"""


def _missing() -> str:
    needed = {"gcsfs": "gcsfs", "gcp_storage_emulator": "gcp-storage-emulator"}
    return ", ".join(name for module, name in needed.items() if importlib.util.find_spec(module) is None)


@pytest.fixture(scope="module")
def environment():
    """What a process needs to take the emulator for the service."""
    if missing := _missing():
        pytest.skip(f"needs {missing}: pip install 'mole-jax[dev]'")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER, str(port)], **pipes) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        address = f"http://127.0.0.1:{port}"
        yield os.environ | {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": tiny.CHILD_FLAGS,
            "PYTHONPATH": str(tiny.ROOT),
        }
        server.kill()


CONFIG = """
import dataclasses, sys
from pathlib import Path
from mole_jax.config import ModelConfig
from tests import tiny

def get_config():
    config = tiny.config(Path("data"), train={{"steps": 6}}, checkpoint={{"every": 2, "keep_last": 9}})
    place = lambda one: dataclasses.replace(one, path=one.path.replace("data/", "{data}/", 1))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, preset=None, base="{base}"),
        data=dataclasses.replace(config.data, domains=tuple(map(place, config.data.domains))),
        evaluation=dataclasses.replace(config.evaluation, tasks=tuple(map(place, config.evaluation.tasks))),
    )
"""
UPLOAD = """
import sys
from pathlib import Path
from etils import epath
for folder, target in zip(sys.argv[1::2], sys.argv[2::2]):
    for file in Path(folder).rglob("*"):
        if file.is_file():
            (epath.Path(target) / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
"""
FILES = """
import sys
from etils import epath
for name in sys.argv[1:]:
    sys.stdout.write(epath.Path(name).read_text() + "\\0")
"""
HALF = """
from etils import epath
whole, half = (epath.Path("gs://mole-bucket/run/checkpoints") / step for step in ("6", "8"))
for name in ("_CHECKPOINT_METADATA", "meta/metadata"):  # as a kill leaves it: no commit_success.txt
    (half / name).write_bytes((whole / name).read_bytes())
"""


def _door(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def _python(environment: dict[str, str], code: str, *arguments: str) -> str:
    done = _door(environment, "-c", code, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _run(environment: dict[str, str], door: str, *arguments: str) -> str:
    done = _door(environment, "-m", f"mole_jax.{door}", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_run_on_gs_is_trained_killed_resumed_evaluated_and_converted(environment, tmp_path):
    """The same numbers as the run on a disk; a checkpoint without its mark of success is no checkpoint."""
    data = tiny.write_data(tmp_path / "data")
    random = tiny.write_config(tmp_path / "random.py", data, train={"steps": 1}, evaluation={"tasks": ()})
    _run(environment, "train", "--config", str(random), "--workdir", str(tmp_path / "first"))
    base = tmp_path / "first" / "base"
    _python(environment, UPLOAD, str(data), f"{BUCKET}/data", str(base), f"{BUCKET}/base")
    local, remote = tmp_path / "local.py", tmp_path / "remote.py"
    local.write_text(CONFIG.format(data=data, base=base))
    remote.write_text(CONFIG.format(data=f"{BUCKET}/data", base=f"{BUCKET}/base"))
    tokenizer = ("--model.tokenizer", tiny.TOKENIZER)
    _run(environment, "train", "--config", str(local), "--workdir", str(tmp_path / "run"), *tokenizer)

    train = [sys.executable, "-m", "mole_jax.train", "--config", str(remote), "--workdir", f"{BUCKET}/run", *tokenizer]
    _killed_after_a_checkpoint(environment, train)
    again = _door(environment, *train[1:])
    assert again.returncode == 0, again.stderr[-2000:]
    assert "from step" in again.stderr

    shown = _python(environment, FILES, f"{BUCKET}/run/metrics.jsonl", f"{BUCKET}/run/eval/step_00000006.json")
    metrics, result, _ = shown.split("\0")
    losses = [json.loads(line)["loss"] for line in metrics.splitlines()]
    expected = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_array_equal(losses, expected)
    here = json.loads((tmp_path / "run" / "eval" / "step_00000006.json").read_text())["tasks"]
    assert {name: task["loss"] for name, task in json.loads(result)["tasks"].items()} == {
        name: task["loss"] for name, task in here.items()
    }

    _python(environment, HALF)
    scores = ["--config", str(remote), "--checkpoint", f"{BUCKET}/run", "--workdir", f"{BUCKET}/scores", *tokenizer]
    _run(environment, "evaluate", *scores)
    assert (
        json.loads(_python(environment, FILES, f"{BUCKET}/scores/eval/step_00000006.json").split("\0")[0])["step"] == 6
    )
    for source, target in ((f"{BUCKET}/run", "from_bucket"), (str(tmp_path / "run"), "from_disk")):
        _run(environment, "convert", "--input", source, "--output", str(tmp_path / target), "--to", "mole")
    name = "adapter_model.safetensors"
    assert (tmp_path / "from_bucket" / name).read_bytes() == (tmp_path / "from_disk" / name).read_bytes()


def test_every_format_is_written_to_a_bucket_and_read_from_it(environment, tmp_path, goldens):
    """To the byte what is written to a disk, over a Hugging Face folder in the bucket; and faults on the way."""
    _python(environment, UPLOAD, str(goldens / "tiny_llava"), f"{BUCKET}/tiny_llava")
    two = environment | {"XLA_FLAGS": f"{tiny.CHILD_FLAGS} --xla_force_host_platform_device_count=2"}
    for trial in (("formats", str(tmp_path), BUCKET), ("faults", BUCKET)):
        done = _door(two, "-m", "tests.on_bucket", *trial)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_containers_are_read_from_a_bucket(environment, tmp_path):
    """Those that Python opens itself give the same records; what has its own readers is one line."""
    away = environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = _door(away, "-m", "tests.on_bucket", "containers", str(tmp_path), BUCKET)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def _killed_after_a_checkpoint(environment: dict[str, str], train: list[str]) -> None:
    """Starts the run and kills it once the checkpoint of step 2 is whole."""
    done = "import sys\nfrom etils import epath\nprint(epath.Path(sys.argv[1]).exists())"
    with subprocess.Popen(train, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 500
        while time.monotonic() < end and process.poll() is None:
            mark = f"{BUCKET}/run/checkpoints/2/commit_success.txt"
            if _python(environment, done, mark).strip() == "True":
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode in (-9, 0)


def test_a_bucket_that_is_not_there_is_one_line(environment, tmp_path: Path):
    data = tiny.write_data(tmp_path / "data")
    config = tiny.write_config(tmp_path / "config.py", data, train={"steps": 1}, evaluation={"tasks": ()})
    done = _door(environment, "-m", "mole_jax.train", "--config", str(config), "--workdir", "gs://no-such-bucket/run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "gs://no-such-bucket/run" in done.stderr.splitlines()[-1]


def test_a_conversion_to_a_bucket_that_is_not_there_is_one_line(environment, goldens):
    for to in ("hf", "run"):
        given = ("--input", str(goldens / "tiny_llava"), "--output", "gs://no-such-bucket/x", "--to", to)
        done = _door(environment, "-m", "mole_jax.convert", *given)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: gs://no-such-bucket/x")
