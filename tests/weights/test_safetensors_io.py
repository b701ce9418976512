"""Files written a tensor at a time, read by the safetensors library."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mole_jax.weights.safetensors_io import TensorFolder, write_file

TENSORS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "vector": np.array([1.5, -2, 3], ml_dtypes.bfloat16),
    "scalar": np.array(4, np.float16),
    "empty": np.zeros((0, 5), np.float16),
}
DECLARED = {name: (value.shape, value.dtype) for name, value in TENSORS.items()}


def test_the_library_reads_what_is_written(tmp_path):
    write_file(tmp_path / "a.safetensors", DECLARED, TENSORS.items(), {"format": "pt", "note": "ü\n"})
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
    "given",
    [
        list(reversed(TENSORS.items())),
        [("matrix", TENSORS["matrix"].T), *list(TENSORS.items())[1:]],
        [("matrix", TENSORS["matrix"].astype(np.float16)), *list(TENSORS.items())[1:]],
        list(TENSORS.items())[:-1],
        [*TENSORS.items(), ("more", TENSORS["scalar"])],
    ],
    ids=["order", "shape", "type", "too few", "too many"],
)
def test_what_comes_must_be_what_was_declared(tmp_path, given):
    with pytest.raises(ValueError, match=r"came where|longer|shorter"):
        write_file(tmp_path / "a.safetensors", DECLARED, given, {})
