"""What `test_buckets` runs in a process that takes its emulator for the service: ``python -m tests.on_bucket NAME``."""

from __future__ import annotations

import gc
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mole_jax.config import MeshConfig
from mole_jax.data.containers.open import image_root, open_records
from mole_jax.errors import UserError
from mole_jax.files import write_bytes, writing
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.weights.convert import convert
from mole_jax.weights.open import open_source, place
from tests.data.containers.written import CONTAINERS
from tests.weights.runs import GROUPS, host, trained_run

RUNS = {
    "mole": {"kind": "mole", "experts": 2},
    "lora": {"kind": "lora"},
    "released": {"kind": "mole", "experts": 2, "arch": {"feature_layer": -1, "image_vectors": True}},
}
WRITTEN = (
    ("mole", "mole", None),
    ("mole", "mixlora", None),
    ("mole", "hf", None),  # as a Mixtral, which is not read
    ("mole", "peft", 0),
    ("lora", "hf", None),
    ("lora", "peft", None),
    ("released", "llava_mole", None),
)


def formats(here: Path, bucket: epath.Path) -> None:
    """Writes runs over a base in the bucket in every format, to a disk and to the bucket, and reads both."""
    for name, settings in RUNS.items():
        trained_run(here / name, bucket / "tiny_llava", **settings)
    for run, to, expert in WRITTEN:
        name = f"{run}_as_{to}"
        for folder in (bucket, here):
            convert(str(here / run), str(folder / name), to, expert=expert)
        there, local = bucket / name, here / name
        assert sorted(file.name for file in there.iterdir()) == sorted(file.name for file in local.iterdir())
        for file in local.iterdir():
            assert (there / file.name).read_bytes() == file.read_bytes(), file
        if (run, to) != ("mole", "hf"):
            _read_alike(there, local, None if to in ("hf", "mole", "peft") else str(bucket / "tiny_llava"))
        print(name, flush=True)


def _read_alike(there: epath.Path, local: Path, base: str | None) -> None:
    """Whole arrays on one device, and on two the part of each."""
    sources = [open_source(str(folder), base=base) for folder in (there, local)]
    assert sources[0].content_hash() == sources[1].content_hash()
    for mesh in (MeshConfig(data=1), MeshConfig(data=1, fsdp=2)):
        found, expected = (
            host(place(ModelSpec.of(one.architecture, one.adapter), one, make_mesh(mesh), GROUPS, "float32", 0))
            for one in sources
        )
        assert found.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)


def faults(bucket: epath.Path) -> None:
    """What is not written to its end does not appear; what cannot be read, or written, is one line."""
    for old in (None, b"old"):
        for size in (10, 12 << 20):  # less and more than a stream holds back
            name = bucket / "half" / f"{old}{size}"
            if old:
                write_bytes(name, old)
            with pytest.raises(ZeroDivisionError):
                _stopped(name, size)
            gc.collect()
            assert (name.read_bytes() if name.exists() else None) == old
    file = bucket / "tiny_llava" / "model.safetensors"
    content = file.read_bytes()
    write_bytes(file, content[:-100])
    with pytest.raises(UserError, match=f"{file}: not a whole safetensors file"):
        open_source(str(file.parent))
    write_bytes(file, content)
    write_bytes(bucket / "torch" / "pytorch_model.bin", b"PK")
    write_bytes(bucket / "torch" / "config.json", (file.parent / "config.json").read_bytes())
    with pytest.raises(UserError, match="of a bucket only safetensors are read; copy the checkpoint to a disk"):
        open_source(str(bucket / "torch"))


def _stopped(name: epath.Path, size: int) -> None:
    with writing(name) as stream:
        stream.write(bytes(size))
        stream.write(b"%d" % (1 // 0))


def containers(here: Path, bucket: epath.Path) -> None:
    """Reads every container from the bucket as from the disk."""
    for number, (name, write) in enumerate(CONTAINERS.items()):
        (folder := here / str(number)).mkdir()
        path = write(folder)
        expected = open_records(path)
        for file in folder.rglob("*"):
            if file.is_file():
                (bucket / str(number) / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
        there = path.replace(str(folder), str(bucket / str(number)))
        if name in ("hf", "hf folder", "array_record"):
            with pytest.raises(UserError, match=r"; (copy|check|name) "):
                open_records(there)
            continue
        records = pickle.loads(pickle.dumps(open_records(there)))
        assert [records[i] for i in range(len(records))] == list(records.values()) == list(expected.values()), name
        assert records.sha256 == expected.sha256, name
        assert image_root(there, None) == str(bucket / str(number)) + ("/set" if name == "parquet shards" else "") + (
            "/tars" if name.startswith("webdataset") else ""
        )
        print(name, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "containers":
        containers(Path(sys.argv[2]), epath.Path(sys.argv[3]))
    elif sys.argv[1] == "formats":
        formats(Path(sys.argv[2]), epath.Path(sys.argv[3]))
    else:
        faults(epath.Path(sys.argv[2]))
