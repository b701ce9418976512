"""What each family's export is for: transformers and PEFT give our logits with it, in an environment that has torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mole_jax.model.spec import ModelSpec
from mole_jax.parameters import unflatten
from mole_jax.weights.convert import convert
from tests.families.conftest import plain_of
from tests.families.golden import FOLDER, NAMES, batch_of, forward
from tests.weights.runs import leaves_of, trained_run

pytestmark = pytest.mark.torch
ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, warnings
import numpy, torch
from transformers import AutoModelForImageTextToText

folder, adapters, block = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
left = {name: sorted(found) for name, found in info.items() if found}
assert not left, f"keys that do not fit: {left}"
assert not block or any(type(one).__name__ == block for one in model.modules()), "another decoder"
if adapters:
    from peft import PeftModel
    warnings.simplefilter("error", UserWarning)  # PEFT only warns of keys that it did not find
    model = PeftModel.from_pretrained(model, adapters)
    model.save_pretrained("saved")
given = {name: torch.from_numpy(one) for name, one in numpy.load("inputs.npz").items()}
with torch.no_grad():
    logits = model.eval()(**{name: one for name, one in given.items()}).logits
numpy.save("logits.npy", logits[0].numpy())
"""


def logits_of_torch(
    folder: Path, golden, case, checkpoint: Path, adapters: Path | str = "", *, block: str = ""
) -> np.ndarray:
    python = os.environ.get("MOLE_JAX_TORCH_PYTHON")
    if not python:
        pytest.skip("MOLE_JAX_TORCH_PYTHON names no interpreter that has torch, transformers 5 and peft")
    names = ("pixel_values", "image_sizes", "batch_num_images", "pixel_attention_mask")
    inputs = {name: case.expected[name] for name in names if name in case.expected}
    np.savez(folder / "inputs.npz", input_ids=case.expected["input_ids"][None], **inputs)
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [python, "script.py", str(checkpoint), str(adapters), block]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "logits.npy")


def our_logits(spec: ModelSpec, leaves, case) -> np.ndarray:
    return forward(spec.graph)(unflatten(leaves), *batch_of([case]))[2][0, : case.length]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_a_merged_lora_of_every_family(name, tmp_path):
    golden = plain_of(name).golden
    case = golden.cases["two"]
    spec, leaves = trained_run(tmp_path / "run", FOLDER / name, kind="lora", prompt=None, image_aspect=None)
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    theirs = logits_of_torch(tmp_path, golden, case, tmp_path / "hf")
    np.testing.assert_allclose(our_logits(spec, leaves, case), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava_qwen3", "smolvlm", "internvl"])
def test_peft_loads_the_adapter_and_we_load_pefts(name, tmp_path):
    golden = plain_of(name).golden
    case = golden.cases["tall"]
    spec, leaves = trained_run(tmp_path / "run", FOLDER / name, kind="lora", prompt=None, image_aspect=None)
    convert(str(tmp_path / "run"), str(tmp_path / "peft"), "peft")
    theirs = logits_of_torch(tmp_path, golden, case, FOLDER / name, tmp_path / "peft")
    np.testing.assert_allclose(our_logits(spec, leaves, case), theirs, atol=1e-4, rtol=1e-4)
    shutil.copy(FOLDER / name / "tokenizer.json", tmp_path / "saved")
    _, again = leaves_of(tmp_path / "saved", base=FOLDER / name)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("llava_qwen2", "Qwen2MoeSparseMoeBlock"),
        ("llava_qwen3", "Qwen3MoeSparseMoeBlock"),
        ("llava_next_vicuna", "MixtralSparseMoeBlock"),
        ("llava_next_mistral", "MixtralSparseMoeBlock"),
        ("llava_onevision", "Qwen2MoeSparseMoeBlock"),
        ("smolvlm", "MixtralSparseMoeBlock"),
        ("internvl", "Qwen2MoeSparseMoeBlock"),
    ],
)
def test_transformers_loads_merged_experts_of_every_family(name, block, tmp_path):
    golden = plain_of(name).golden
    case = golden.cases["wide"]
    spec, leaves = trained_run(tmp_path / "run", golden.folder, kind="mole", prompt=None, image_aspect=None)
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    theirs = logits_of_torch(tmp_path, golden, case, tmp_path / "hf", block=block)
    np.testing.assert_allclose(our_logits(spec, leaves, case), theirs, atol=1e-4, rtol=1e-4)
