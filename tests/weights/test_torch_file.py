"""torch's own files without torch. `files/` holds what PyTorch 2.13 wrote:

base = torch.arange(24, dtype=torch.float32)
state = {"plain": base.reshape(4, 6), "transposed": base.reshape(4, 6).t(), "view": base[6:18].reshape(3, 4),
         "bfloat16": torch.arange(8).to(torch.bfloat16).reshape(2, 4) / 4,
         "half": (torch.arange(6).to(torch.float16) - 3).reshape(2, 3),
         "parameter": torch.nn.Parameter(torch.tensor([0.5, -1.5])), "ids": torch.arange(5).expand(1, 5),
         "scalar": torch.tensor(7.0), "empty": torch.zeros(0, 3)}
torch.save({"state_dict": state, "epoch": 3}, "state_dict.pt")
torch.save(linear.state_dict(), "module.bin"); torch.save(linear, "whole_module.pt")  # weight arange(6), bias 10, 20
torch.save({"a": torch.ones(2)}, "legacy.pt", _use_new_zipfile_serialization=False)
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mole_jax.errors import UserError
from mole_jax.weights.torch_file import TorchFile

FILES = Path(__file__).parent / "files"
GRID = np.arange(24, dtype=np.float32).reshape(4, 6)
EXPECTED = {
    "plain": GRID,
    "transposed": GRID.T,
    "view": np.arange(6, 18, dtype=np.float32).reshape(3, 4),
    "bfloat16": (np.arange(8).reshape(2, 4) / 4).astype(ml_dtypes.bfloat16),
    "half": (np.arange(6).reshape(2, 3) - 3).astype(np.float16),
    "parameter": np.array([0.5, -1.5], np.float32),
    "ids": np.arange(5)[None],
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def test_every_tensor_of_a_file_that_torch_wrote():
    file = TorchFile(FILES / "state_dict.pt")
    assert file.shapes == {name: value.shape for name, value in EXPECTED.items()}
    for name, value in EXPECTED.items():
        found = file.read(name)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value, err_msg=name)


def test_slices():
    file = TorchFile(FILES / "state_dict.pt")
    for name in ("plain", "transposed"):
        np.testing.assert_array_equal(file.read(name, (slice(1, 3), slice(2, 4))), EXPECTED[name][1:3, 2:4])


def test_a_modules_state_dict():
    file = TorchFile(FILES / "module.bin")
    np.testing.assert_array_equal(file.read("weight"), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(file.read("bias"), [10, 20])


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        TorchFile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def archive(path: Path, pickled: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", pickled)
        for name, value in entries.items():
            made.writestr(f"x/{name}", value)
    return path


class Runs:
    def __reduce__(self):
        return (open, ("made_by_the_pickle", "w"))


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(archive(tmp_path / "bad.pt", pickle.dumps({"weight": Runs()})))
    assert "it asks for" in message
    assert "open" in message
    assert not (tmp_path / "made_by_the_pickle").exists()
    assert "it asks for torch.nn.modules.linear.Linear" in refused(FILES / "whole_module.pt")


def test_what_is_no_state_dict(tmp_path):
    assert "no whole file of torch 1.6 or later" in refused(FILES / "legacy.pt")
    assert "holds no state dict" in refused(archive(tmp_path / "a.pt", pickle.dumps({"epoch": 3})))
    assert "holds no state dict" in refused(archive(tmp_path / "b.pt", pickle.dumps([1, 2])))
    assert "big-endian" in refused(archive(tmp_path / "c.pt", pickle.dumps({}), byteorder=b"big"))
    whole = (FILES / "state_dict.pt").read_bytes()
    for cut in (0, 100, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        assert "download or save it again" in refused(tmp_path / "cut.pt")


def test_a_tensor_that_reaches_beyond_its_bytes(tmp_path):
    """A file whose description lies must not show other bytes: here its first storage is cut to half."""
    changed = io.BytesIO()
    with zipfile.ZipFile(FILES / "state_dict.pt") as before, zipfile.ZipFile(changed, "w") as after:
        for entry in before.infolist():
            content = before.read(entry)
            after.writestr(entry.filename, content[:48] if entry.filename.endswith("/data/0") else content)
    (tmp_path / "short.pt").write_bytes(changed.getvalue())
    assert "tensor 'plain' of shape (4, 6) reaches beyond its 12 numbers" in refused(tmp_path / "short.pt")
