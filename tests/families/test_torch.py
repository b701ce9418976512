"""What each family's export is for: transformers and PEFT give our logits with it, in an environment that has torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import mole_jax
from mole_jax.config import DecodingConfig
from mole_jax.model.spec import ModelSpec
from mole_jax.parameters import unflatten
from mole_jax.tokenizer import Tokenizer
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


def by_torch(folder: Path, script: str, *arguments: str) -> str:
    """Runs a script in `folder` by the interpreter that has torch and returns what it prints."""
    python = os.environ.get("MOLE_JAX_TORCH_PYTHON")
    if not python:
        pytest.skip("MOLE_JAX_TORCH_PYTHON names no interpreter that has torch, transformers 5 and peft")
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "script.py", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def logits_of_torch(
    folder: Path, golden, case, checkpoint: Path, adapters: Path | str = "", *, block: str = ""
) -> np.ndarray:
    names = ("pixel_values", "image_sizes", "batch_num_images", "pixel_attention_mask")
    inputs = {name: case.expected[name] for name in names if name in case.expected}
    np.savez(folder / "inputs.npz", input_ids=case.expected["input_ids"][None], **inputs)
    by_torch(folder, SCRIPT, str(checkpoint), str(adapters), block)
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


ANSWER = """
import json, sys
import numpy, torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("hf")
processor.image_processor = AutoImageProcessor.from_pretrained("hf", backend="pil")  # torchvision rounds otherwise
model = AutoModelForImageTextToText.from_pretrained("hf", dtype=torch.float32).eval()
content = [{"type": "image", "url": sys.argv[1]}, {"type": "text", "text": sys.argv[2]}]
messages = [{"role": "user", "content": content}]
asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
given = processor.apply_chat_template(messages, **asked)
made = model.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :]
numpy.savez("answer.npz", input_ids=given["input_ids"][0], pixel_values=given["pixel_values"])
print(json.dumps(processor.decode(made, skip_special_tokens=True).strip()))
"""


@pytest.mark.parametrize("name", NAMES)
def test_transformers_answers_about_a_picture_as_we_do_from_the_export_alone(name, tmp_path):
    trained_run(tmp_path / "run", FOLDER / name, kind="lora", prompt="checkpoint", image_aspect=None, spread=0.02)
    Tokenizer.load(FOLDER / name).save(str(tmp_path / "run"))
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    picture, question = FOLDER / name / "picture_1.png", "Is there a lesion?"
    told = json.loads(by_torch(tmp_path, ANSWER, str(picture), question).strip().splitlines()[-1])
    model, processor = mole_jax.load(str(tmp_path / "run"), dtype="float32")
    ours, theirs = processor(question, picture), np.load(tmp_path / "answer.npz")
    np.testing.assert_array_equal(theirs["input_ids"], ours.tokens)
    spec = processor.arch.image
    pixels = (ours.images / 255 - np.array(spec.mean)) / np.array(spec.std)
    tiles = theirs["pixel_values"].reshape(-1, 3, spec.size, spec.size)[: len(pixels)]
    np.testing.assert_allclose(tiles.transpose(0, 2, 3, 1), pixels, atol=1e-5)
    (answer,) = mole_jax.generate(model, processor, question, picture, decoding=DecodingConfig(max_new_tokens=8))
    assert answer == told


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
