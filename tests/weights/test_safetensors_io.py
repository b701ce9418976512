"""Files written a tensor at a time, read by the safetensors library."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors import safe_open
from safetensors.numpy import load_file

from mole_jax.errors import UserError
from mole_jax.weights.leaf import as_leaf, tensor
from mole_jax.weights.safetensors_io import FetchedFile, TensorFolder, write_file

TENSORS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "vector": np.array([1.5, -2, 3], ml_dtypes.bfloat16),
    "scalar": np.array(4, np.float16),
    "empty": np.zeros((0, 5), np.float16),
}


def test_the_library_reads_what_is_written(tmp_path):
    given = {name: as_leaf("", value) for name, value in TENSORS.items()}
    write_file(tmp_path / "a.safetensors", given, {"format": "pt", "note": "ü\n"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value, err_msg=name)
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as handle:
        assert handle.metadata() == {"format": "pt", "note": "ü\n"}
    folder = TensorFolder((tmp_path / "a.safetensors",))
    np.testing.assert_array_equal(folder.read("matrix", (slice(1, 3), slice(0, 1))), TENSORS["matrix"][1:3, :1])


@pytest.mark.parametrize(
    "index", [(), (slice(1, 3), slice(0, 1)), (slice(None), slice(1, None)), (slice(2, 1), slice(9)), (slice(2),)]
)
def test_what_is_fetched_by_ranges_is_what_was_written(tmp_path, index):
    path = tmp_path / "a.safetensors"
    write_file(path, {name: as_leaf("", value) for name, value in TENSORS.items()}, {"note": "ü\n"})
    fetched = FetchedFile(epath.Path(path))
    assert fetched.metadata == {"note": "ü\n"}
    for name, value in TENSORS.items():
        if len(index) <= value.ndim:
            read = fetched.read(name, index)
            assert (read.dtype, fetched.shapes[name]) == (value.dtype, value.shape)
            np.testing.assert_array_equal(read, value[index], err_msg=name)


def test_a_file_that_is_not_written_to_its_end_does_not_appear(tmp_path):
    def broken():
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be written \(No space left"):
        write_file(path, {"a": tensor((2,), np.dtype(np.float32), broken)}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_comes_must_be_what_was_declared(tmp_path):
    wrong = tensor((3, 2), np.dtype(np.float32), lambda: np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"a came as \(2, 3\), \(3, 2\) was declared"):
        write_file(tmp_path / "a.safetensors", {"a": wrong}, {})
