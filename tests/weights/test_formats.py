"""The tuple of formats: each input is one of them, and one more object is a format that the converter knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.weights import formats
from mole_jax.weights.convert import convert
from mole_jax.weights.foreign import AdapterFile, Row, read_table
from mole_jax.weights.format import Format, Given, over_base, trained_arrays
from mole_jax.weights.open import open_source
from mole_jax.weights.safetensors_io import open_state_dict
from tests.tiny import ROOT
from tests.weights.runs import leaves_of, trained_run


def first_of(path) -> str:
    given = Given(str(path), absolute(str(path)), open_source)
    return next(one.name for one in formats.FORMATS if one.recognise(given))


def test_each_input_is_of_its_own_format(goldens, tmp_path):
    base = goldens / "tiny_llava"
    released = {"feature_layer": -1, "image_vectors": True}
    trained_run(tmp_path / "lora", base, kind="lora")
    trained_run(tmp_path / "run", base, kind="mole")
    trained_run(tmp_path / "all", base, kind="mole", arch=released)
    for source, to in (("lora", "peft"), ("run", "mixlora"), ("run", "mole"), ("all", "llava_mole"), ("lora", "hf")):
        convert(str(tmp_path / source), str(tmp_path / to), to)
        assert first_of(tmp_path / to) == to
    assert first_of(tmp_path / "run") == "run"
    assert first_of(tmp_path / "run" / "checkpoints" / "0") == "run"
    original = tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    assert first_of(original) == "llava"


def test_names_are_unique_and_what_is_read_or_written_is_described():
    names = [one.name for one in formats.FORMATS]
    assert len(set(names)) == len(names)
    for one in formats.FORMATS:
        assert bool(one.reads) == (one.read is not None), one.name
        assert bool(one.writes) == (one.write is not None), one.name
    files = {file.stem for file in Path(formats.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(names) == files, "one file a format"


def test_the_help_of_the_door_comes_from_the_formats():
    command = [sys.executable, "-m", "mole_jax.convert", "--help"]
    wide = os.environ | {"COLUMNS": "2000"}
    told = subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True, check=True).stdout
    words = " ".join(told.split())
    assert "{hf,llava_mole,mixlora,mole,peft,run}" in words
    for one in formats.FORMATS:
        assert one.reads in words, one.name
        assert one.writes in words, one.name


FILE = "toy.npz"


def toy_read(given: Given):
    def reader(path, arch):
        tensors = open_state_dict(path / FILE)
        where, rank = path / FILE, int(tensors.read("rank"))
        kernel = "decoder/layers/attention/q_proj/adapter/"
        layers, width = arch.decoder.layers, arch.decoder.width
        table = {
            kernel + side: Row((side,), shape, lambda names, read: read(names[0]))
            for side, shape in (("a", (layers, width, rank)), ("b", (layers, rank, width)))
        }
        arrays = read_table(tensors, table, where=where, what="is no toy", asks="the base", ignored=("rank",))
        return AdapterFile(toy_adapter(rank), arrays, ("adapters",))

    return over_base(given, None, reader)


def toy_adapter(rank):
    return AdapterConfig(kind="lora", rank=rank, alpha=6.0, targets=("q_proj",))


def toy_write(export, folder: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    arrays = {path.rpartition("/")[2]: np.asarray(leaf) for path, leaf in export.leaves.items() if "adapter" in path}
    np.savez(Path(folder) / FILE, rank=export.adapter.rank, **arrays)


TOY = Format(
    name="toy",
    reads="a toy",
    recognise=lambda given: (given.path / FILE).is_file(),
    options=("base",),
    read=toy_read,
    writes="a toy",
    kinds=("lora",),
    wants=trained_arrays,
    write=toy_write,
)


def test_a_new_format_is_one_object(goldens, tmp_path, monkeypatch):
    """It is read, written, described and refused by what it declares and the helper's four steps."""
    monkeypatch.setattr(formats, "FORMATS", (TOY, *formats.FORMATS))
    assert formats.choices()["toy"] == "a toy"
    assert formats.recognised().startswith("a toy, ")
    base = goldens / "tiny_llava"
    _, leaves = trained_run(tmp_path / "run", base, kind="lora", targets=("q_proj",))
    assert "as float32" in convert(str(tmp_path / "run"), str(tmp_path / "toy"), "toy")
    spec, again = leaves_of(tmp_path / "toy", base=base)
    assert spec.adapter.targets == ("q_proj",)
    for side in "ab":
        path = f"decoder/layers/attention/q_proj/adapter/{side}"
        np.testing.assert_array_equal(again[path], leaves[path])
    with pytest.raises(UserError, match="already holds a model"):
        convert(str(tmp_path / "run"), str(tmp_path / "toy"), "toy")
    with pytest.raises(UserError, match="leave out --alpha 2"):
        open_source(str(tmp_path / "toy"), base=str(base), alpha=2.0)
    np.savez(tmp_path / "toy" / FILE, rank=3, a=leaves["decoder/layers/attention/q_proj/adapter/a"], c=np.ones(1))
    with pytest.raises(UserError, match=r"is no toy; 1 missing: b; 1 unknown: c"):
        open_source(str(tmp_path / "toy"), base=str(base))
