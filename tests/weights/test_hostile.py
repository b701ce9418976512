"""Files that lie about themselves, and sizes that no model has: one line each, at once and in little memory."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import struct
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from mole_jax.errors import UserError
from mole_jax.weights.convert import convert
from mole_jax.weights.open import open_source
from mole_jax.weights.safetensors_io import INDEX, SINGLE, FetchedFile, TensorFolder, open_state_dict
from mole_jax.weights.torch_file import TorchFile
from tests.weights.runs import trained_run

FILES = Path(__file__).parent / "files"


@contextmanager
def one_line(match: str, seconds: float = 5.0, megabytes: int = 300):
    """A `UserError` of one line, without the memory or the time that the file asks for."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2_000
    assert time.monotonic() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes << 10


@pytest.fixture
def folder(goldens, tmp_path):
    shutil.copytree(goldens / "tiny_llava", tmp_path / "hf")
    return tmp_path / "hf"


def change_config(folder: Path, section: str, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if section == "" else config[section]).update(values)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "num_hidden_layers", -1),
        ("text_config", "vocab_size", 10**12),
        ("text_config", "hidden_size", 2**40),
        ("text_config", "head_dim", 10**9),
        ("text_config", "num_attention_heads", 10**9),
        ("text_config", "num_key_value_heads", 0),
        ("text_config", "intermediate_size", 10**10),
        ("text_config", "max_position_embeddings", 10**30),
        ("text_config", "eos_token_id", 10**20),
        ("text_config", "rms_norm_eps", float("nan")),
        ("text_config", "rms_norm_eps", float("inf")),
        ("text_config", "rms_norm_eps", 10**400),
        ("vision_config", "num_hidden_layers", 10**9),
        ("vision_config", "image_size", 10**9),
        ("vision_config", "patch_size", 0),
        ("", "image_token_index", 2**40),
        ("", "image_token_index", -5),
    ],
)
def test_sizes_that_no_model_has(folder, section, key, value):
    change_config(folder, section, **{key: value})
    with one_line(f"config.json: ?.*'{key}' is "):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architecture": {"decoder": {"layers": 10**9}}}, "layers of the decoder is 1000000000, expected 1 to 1,000"),
        ({"architecture": {"decoder": {"vocab": -4}}}, "vocab of the decoder is -4"),
        ({"architecture": {"vision": {"width": 0}}}, "width of the vision is 0"),
        ({"adapter": {"rank": 10**9}}, "rank of the adapters is 1000000000"),
        ({"adapter": {"experts": 0}}, "experts of the adapters is 0"),
        ({"adapter": {"targets": ["w1"]}}, "targets name 'w1'"),
    ],
)
def test_an_adapter_folder_of_absurd_sizes(goldens, tmp_path, change, match):
    trained_run(tmp_path / "run", goldens / "tiny_llava", kind="mole")
    convert(str(tmp_path / "run"), str(tmp_path / "mole"), "mole")
    file = tmp_path / "mole" / "adapter_config.json"

    def merge(values: dict, changes: dict) -> dict:
        return values | {k: merge(values[k], v) if isinstance(v, dict) else v for k, v in changes.items()}

    file.write_text(json.dumps(merge(json.loads(file.read_text()), change)))
    with one_line(match):
        open_source(str(tmp_path / "mole"))


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path: Path, header: dict | bytes, rest: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + rest)


def test_safetensors_headers_that_lie(folder):
    file = folder / SINGLE
    header, rest = header_of(file)
    first, second = [name for name in header if name != "__metadata__"][:2]

    def changed(name: str, **values) -> dict:
        return header | {name: header[name] | values}

    end = header[first]["data_offsets"][1]
    for given, length in (
        (header, 2**62),
        (header, len(rest) * 4),
        (b"[" * 100_000, None),
        (b"{}", None),
        (changed(first, shape=[2**40, 2**40]), None),
        (changed(first, shape=[1]), None),
        (changed(first, dtype="F64"), None),
        (changed(first, data_offsets=[0, 2**60]), None),
        (changed(second, data_offsets=header[first]["data_offsets"]), None),
        (changed(first, data_offsets=[end, 0]), None),
        (changed(first, shape="ab"), None),
        (changed(first, data_offsets=None), None),
        (header | {"__metadata__": [1]}, None),
        (b"[1]", None),
    ):
        with_header(file, given, rest, length)
        with one_line("not a whole safetensors file|tensors do not fit config.json"):
            open_source(str(folder))
        with one_line("not a whole safetensors file"):  # as it is read from a bucket
            FetchedFile(epath.Path(file))
    with_header(file, changed(first, dtype="I32"), rest)
    with one_line("not a whole|of a type that is none of float32"):
        open_source(str(folder))


def test_a_single_file_beside_an_index_of_others(folder):
    tensors = load_file(folder / SINGLE)
    index = {"weight_map": dict.fromkeys(tensors, SINGLE)}
    (folder / INDEX).write_text(json.dumps(index))
    open_source(str(folder))  # an index of the single file itself says nothing else
    shutil.copy(folder / SINGLE, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    with one_line(
        r"holds model.safetensors and beside it model.safetensors.index.json, .* remove those that are stale"
    ):
        open_source(str(folder))
    (folder / SINGLE).unlink()
    open_source(str(folder))


def npz(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def test_an_archive_that_unpacks_to_far_more_is_not_unpacked(tmp_path):
    zeros = np.zeros(1 << 26, np.float32)
    np.savez_compressed(tmp_path / "bomb.npz", a=zeros)
    del zeros
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert open_state_dict(tmp_path / "bomb.npz").shapes == {"a": (1 << 26,)}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    for content in (b"", b"no array", pickle.dumps([1])):
        with one_line("bad.npz: cannot be read as npz"):
            open_state_dict(npz(tmp_path / "bad.npz", "a.npy", content))
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    with one_line(r"cannot be read as npz \(holds Python objects\)"):
        open_state_dict(tmp_path / "objects.npz")


def torch_archive(path: Path, shape, stride, offset=0, size=64, *, pickled: bytes | None = None, how=0) -> Path:
    """A file of one tensor 'w' of float32 in a storage of `size` bytes, described as given."""
    if pickled is None:
        rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
        storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI1\ntQ"
        shape, stride = (b"(" + b"".join(b"L%dL\n" % one for one in values) + b"t" for values in (shape, stride))
        arguments = b"(" + storage + b"L%dL\n" % offset + shape + stride + b"I00\n}t"
        pickled = b"}Vw\n" + rebuild + arguments + b"Rs."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled, how)
        archive.writestr("x/data/0", bytes(size))
    return path


def test_a_torch_file_as_it_should_be(tmp_path):
    assert TorchFile(torch_archive(tmp_path / "good.pt", (2, 4), (4, 1), 8)).read("w").shape == (2, 4)


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((2, 4), (4, 1), 9),
        ((2**40, 2**40), (0, 0), 0),
        ((17,), (0,), 0),
        ((2,), (2**62,), 0),
        ((2,), (-1,), 1),
        ((-2,), (1,), 0),
        ((2,), (1,), -1),
        ((2,), (1,), 2**70),
        ((2, 2), (1,), 0),
        ((1,) * 200, (1,) * 200, 0),
    ],
)
def test_torch_tensors_whose_description_lies(tmp_path, shape, stride, offset):
    with one_line("bad.pt: .*(reaches beyond its 16 numbers|storage, offset, shape or steps are none|axes)"):
        TorchFile(torch_archive(tmp_path / "bad.pt", shape, stride, offset))


@pytest.mark.parametrize(
    "pickled",
    [
        b"}Vw\nr\xff\xff\xff\x7f.",  # LONG_BINPUT: a table of two thousand million places
        b"}p99999999999\n.",
        b"\x8e\xff\xff\xff\xff\xff\xff\x00\x00.",  # BINBYTES8 of 2**48 bytes
        b"(" * 5_000_000 + b".",
        b"]" * 100_000 + b"a" * 99_999 + b".",
        b"",
        b"}Vw\nI1\nVa\n\x86\nQs.",
    ],
    ids=["table", "put", "bytes", "marks", "nested", "empty", "reference"],
)
def test_pickles_that_ask_for_memory(tmp_path, pickled):
    with one_line("bad.pt: "):
        TorchFile(torch_archive(tmp_path / "bad.pt", (), (), pickled=pickled))


def test_a_torch_archive_that_lies_about_its_entries(tmp_path):
    with one_line("x/data.pkl is compressed"):
        TorchFile(torch_archive(tmp_path / "bomb.pt", (), (), pickled=bytes(1 << 28), how=zipfile.ZIP_DEFLATED))
    file = torch_archive(tmp_path / "size.pt", (2,), (1,))
    content = file.read_bytes()
    at = content.rindex(b"PK\x01\x02")  # the list's entry of x/data/0: its two sizes say 2**31 - 1
    file.write_bytes(content[: at + 20] + struct.pack("<II", 2**31 - 1, 2**31 - 1) + content[at + 28 :])
    with one_line("reaches beyond the end of the file"):
        TorchFile(file)


def test_a_file_of_another_kind_is_told(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3589376\n"
    (tmp_path / SINGLE).write_bytes(pointer)
    with one_line("is a Git LFS pointer"):
        TensorFolder((tmp_path / SINGLE,))
    (tmp_path / "a.pt").write_bytes(pointer)
    with one_line("is a Git LFS pointer"):
        TorchFile(tmp_path / "a.pt")
