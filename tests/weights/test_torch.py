"""Exported files in the software that they are for: transformers and PEFT, in an environment of their own with torch.

The variable MOLE_JAX_TORCH_PYTHON names its interpreter; without it these tests skip.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import mole_jax
from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.config import DecodingConfig
from mole_jax.errors import UserError
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.convert import convert
from mole_jax.weights.safetensors_io import open_state_dict
from tests.tiny import TOKENIZER
from tests.weights.runs import example, leaves_of, logits, trained_run

ROOT = Path(__file__).parents[2]
EXPORT = (ROOT / "docs" / "export.md").read_text()
pytestmark = pytest.mark.torch

LOGITS = """
import numpy, torch
from transformers import LlavaForConditionalGeneration

def load(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)

@torch.no_grad()
def logits(model):
    return model.eval()(**given).logits
"""
INPUTS = """
given = numpy.load("inputs.npz")
given = {"input_ids": torch.from_numpy(given["tokens"]).long(), "pixel_values": torch.from_numpy(given["pixels"])}
"""
MIXTRAL = """
model, info = load("hf")
assert type(model.model.language_model).__name__ == "MixtralModel"
left = {name: sorted(found) for name, found in info.items() if found}
assert not left, f"keys that do not fit: {left}"
result = logits(model)
model.save_pretrained("saved")
assert torch.equal(result, logits(load("saved")[0])), "saved by transformers and loaded again"
numpy.save("logits.npy", result.numpy())
"""
MERGED = """
model, info = load("hf")
assert type(model.model.language_model).__name__ == "LlamaModel"
left = {name: sorted(found) for name, found in info.items() if found}
assert not left, f"keys that do not fit: {left}"
numpy.save("logits.npy", logits(model).numpy())
"""
PEFT = """
import sys, warnings
from peft import PeftModel
warnings.simplefilter("error", UserWarning)  # PEFT only warns of keys that it did not find
model = PeftModel.from_pretrained(load(sys.argv[1])[0], "peft")
assert not any("vision" in name for name, _ in model.named_parameters() if "lora_" in name)
model.save_pretrained("saved")
numpy.save("logits.npy", logits(model).numpy())
"""
PICTURE = """
import json, sys
from transformers import AutoProcessor
messages, backend = json.loads(sys.argv[1]), sys.argv[2]
processor = AutoProcessor.from_pretrained("hf", backend=backend)
asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
given = processor.apply_chat_template(messages, **asked)
model = load("hf")[0]
arrays = {name: given[name].numpy() for name in ("input_ids", "pixel_values")}
numpy.savez(f"{backend}.npz", logits=logits(model).numpy(), **arrays)
"""
STATE_DICT = """
import pathlib, torch
from safetensors.torch import load_file
tensors = load_file("out/llava_mole.safetensors")
torch.save({"state_dict": {name: value.bfloat16() for name, value in tensors.items()}}, "released.pt")
torch.save({"state_dict": {"weight": pathlib.Path("x")}}, "pickle.pt")
"""


def run_by_torch(folder: Path, script: str, *arguments: str) -> str:
    """Runs a script in `folder` by the interpreter that has torch and returns what it prints."""
    python = os.environ.get("MOLE_JAX_TORCH_PYTHON")
    if not python:
        pytest.skip("MOLE_JAX_TORCH_PYTHON names no interpreter that has torch, transformers 5 and peft")
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "script.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def save_example(folder, arch):
    tokens, images = example(arch)
    np.savez(folder / "inputs.npz", tokens=tokens, pixels=images[0].transpose(0, 3, 1, 2))


def compare(folder, name, spec, leaves):
    ours, theirs = logits(spec, leaves), np.load(folder / "logits.npy")
    print(f"\n{name}: largest difference {np.abs(ours - theirs).max():.1e}, largest logit {np.abs(theirs).max():.2f}")
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "aspect"), [("lora", "pad"), ("mole", "crop")])
def test_a_photograph_and_a_question_give_our_logits(shared, tmp_path, kind, aspect):
    """From the files alone: what transformers' processor makes of them, in transformers' model."""
    spec, leaves = trained_run(tmp_path / "run", TOKENIZER, kind=kind, image_aspect=aspect)
    Tokenizer.load(TOKENIZER).save(str(tmp_path / "run"))
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    picture, question = shared / "data" / "biomedical" / "images" / "synpic100132.jpg", "What is on the right?"
    content = [{"type": "image", "url": str(picture)}, {"type": "text", "text": question}]
    _, processor = mole_jax.load(str(tmp_path / "run"))
    ours = processor(question, picture)
    expected = logits(spec, leaves, ours.tokens[None], ours.images[None])
    width, height = Image.open(picture).size
    assert width != height, "how it becomes square matters"
    for backend, levels in (("pil", 1e-3), ("torchvision", 1.001)):
        run_by_torch(tmp_path, LOGITS + PICTURE, json.dumps([{"role": "user", "content": content}]), backend)
        theirs = np.load(tmp_path / f"{backend}.npz")
        np.testing.assert_array_equal(theirs["input_ids"][0], ours.tokens)
        seen = (theirs["pixel_values"][0].transpose(1, 2, 0) * CLIP_STD + CLIP_MEAN) * 255
        np.testing.assert_allclose(seen, ours.images[0], atol=levels)
        print(f"{backend}: {np.abs(theirs['logits'] - expected).max():.1e} of {np.abs(expected).max():.1f}")
        if backend == "pil":
            np.testing.assert_allclose(theirs["logits"], expected, atol=1e-4, rtol=1e-4)


def test_the_readmes_lines_give_our_answer(tmp_path):
    """On a base that was trained, so that the answer is words."""
    (snippet,) = [one for one in re.findall(r"```python\n(.*?)```", EXPORT, re.DOTALL) if "AutoProcessor" in one]
    convert(TOKENIZER, str(tmp_path / "hf"), "hf", "float32")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 90, 3), np.uint8)).save(tmp_path / "picture.png")
    names = {"runs/quickstart/mole_hf": "hf", "runs/quickstart/data/biomedical/images/test_00000.png": "picture.png"}
    for written, here in names.items():
        assert written in snippet
        snippet = snippet.replace(written, here)
    told = run_by_torch(tmp_path, snippet).strip()
    model, processor = mole_jax.load(TOKENIZER, dtype="float32")
    decoding = DecodingConfig(max_new_tokens=32)
    ours = mole_jax.generate(model, processor, "What is on the right?", tmp_path / "picture.png", decoding=decoding)
    assert ours == [told]
    assert told


@pytest.mark.parametrize("golden", ["tiny_llava", "tiny_llava_gqa"])
def test_transformers_loads_the_mixtral_and_gives_our_logits(goldens, tmp_path, golden):
    spec, leaves = trained_run(tmp_path / "run", goldens / golden, kind="mole")
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    save_example(tmp_path, spec.arch)
    run_by_torch(tmp_path, LOGITS + INPUTS + MIXTRAL)
    compare(tmp_path, golden, spec, leaves)


def test_transformers_loads_the_merged_lora_and_gives_our_logits(goldens, tmp_path):
    spec, leaves = trained_run(tmp_path / "run", goldens / "tiny_llava_gqa", kind="lora")
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    save_example(tmp_path, spec.arch)
    run_by_torch(tmp_path, LOGITS + INPUTS + MERGED)
    compare(tmp_path, "merged LoRA", spec, leaves)


def test_peft_loads_the_adapter_and_we_load_pefts(goldens, tmp_path):
    base = goldens / "tiny_llava_gqa"
    spec, leaves = trained_run(tmp_path / "run", base, kind="lora")
    convert(str(tmp_path / "run"), str(tmp_path / "peft"), "peft")
    save_example(tmp_path, spec.arch)
    run_by_torch(tmp_path, LOGITS + INPUTS + PEFT, str(base))
    compare(tmp_path, "peft", spec, leaves)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "saved"))
    assert ours.keys() == theirs.keys()
    again_spec, again = leaves_of(tmp_path / "saved", base=base)
    assert again_spec.adapter.rank == spec.adapter.rank
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_a_torch_file_is_read_as_weights_alone(goldens, tmp_path):
    arch = {"feature_layer": -1, "image_vectors": True}
    trained_run(tmp_path / "run", goldens / "tiny_llava", arch=arch, kind="mole")
    convert(str(tmp_path / "run"), str(tmp_path / "out"), "llava_mole", "float32")
    run_by_torch(tmp_path, STATE_DICT)
    written, read = load_file(tmp_path / "out" / "llava_mole.safetensors"), open_state_dict(tmp_path / "released.pt")
    assert read.shapes == {name: value.shape for name, value in written.items()}
    for name, value in written.items():
        np.testing.assert_array_equal(np.asarray(read.read(name)), value.astype(ml_dtypes.bfloat16), err_msg=name)
    with pytest.raises(UserError, match=r"pickle\.pt") as refused:
        open_state_dict(tmp_path / "pickle.pt")
    assert "\n" not in str(refused.value)
