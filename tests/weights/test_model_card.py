"""The model card beside an export: what it says is in the run's files, and nothing else of the machine is."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path

import jax
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import mole_jax
from mole_jax.config import DecodingConfig
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.convert import convert
from tests.families.golden import FOLDER
from tests.families.test_torch import by_torch
from tests.weights.runs import trained_run

HOSTILE = "gen|er`al\n\x1b[31m<b>"


@pytest.fixture
def old(goldens, tmp_path):
    """The run of an earlier version, evaluated at its last step too."""
    run = shutil.copytree(goldens / "old_run" / "run", tmp_path / "run")
    result = json.loads((run / "eval" / "step_00000000.json").read_text())
    general, document = result["tasks"].values()
    general |= {"loss": 0.25, "exact": 0.125, "score": 0.5, "interval": [0.25, 0.75]}
    document |= {"loss": None, "score": None}
    del document["exact"]
    result = {"step": 4, "tasks": {HOSTILE: general, "document": document}}
    (run / "eval" / "step_00000004.json").write_text(json.dumps(result))
    config = json.loads((run / "config.json").read_text())
    config["name"] = "mine\u202e *now*"
    config["data"]["domains"][0]["name"] = HOSTILE
    (run / "config.json").write_text(json.dumps(config))
    return run


def card_of(source: Path, out: Path, to: str, **options) -> str:
    convert(str(source), str(out), to, **options)
    return (out / "README.md").read_text()


def test_a_card_has_what_the_run_says(old, tmp_path):
    card = card_of(old, tmp_path / "hf", "hf")
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mole_jax", "llava", "mixture-of-experts"],
    }
    hostile = r"gen\|er\`al\\n\\x1b\[31m\<b\>"
    base = json.loads((old.parent / "run" / "checkpoints" / "4" / "meta" / "metadata").read_text())["base_hash"]
    for line in (
        r"# mine\\u202e \*now\*",
        f"- base: random weights of seed 0 (hash {base[:12]})",
        "- trained: adapters, router, projector",
        "- steps: 4",
        f"- versions: mole_jax {importlib.metadata.version('mole-jax')}, jax {jax.__version__}",
        f"| {hostile} | - | - |",
        "| document | 33.3 % | 33.3 % |",
        "## Scores at step 4",
        f"| {hostile} | 0.250 | 12.5 % | 50.0 (25.0 to 75.0) | exact_match | 4 |",
        "| document | - | - | - | - | 4 |",
        "| adapter.rank | 2 |",
        "| adapter.experts | 3 |",
        "| adapter.router_gradient | straight_through |",
        "- The scores above are the run's, before this conversion; nothing else has been measured.",
    ):
        assert line in card.splitlines(), line
    assert str(tmp_path) not in card
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", card)
    assert card_of(old, tmp_path / "again", "hf") == card


def test_what_is_not_there_is_left_out_and_one_expert_has_no_scores_of_the_mixture(old, goldens, tmp_path):
    card = card_of(old, tmp_path / "peft", "peft", expert=1)
    assert ModelCard(card).data.library_name == "peft"
    assert "Of 3 experts this has expert 1 alone, as plain LoRA." in card
    assert "Scores at step" not in card
    for name in ("config.json", "data_report.json", "eval/step_00000004.json"):
        (old / name).unlink()
    bare = card_of(old, tmp_path / "bare", "hf")
    assert bare.splitlines()[ModelCard(bare).content.splitlines().index("# run")] == "# run"
    for title in ("Training data", "Scores"):  # of step 0 there are some: they are of no trained weights
        assert f"## {title}" not in bare
    assert "- The run has no scores." in bare


def test_a_base_of_the_hub_is_named_and_a_folder_of_this_machine_is_not(goldens, tmp_path):
    trained_run(tmp_path / "run", goldens / "tiny_llava", kind="lora")
    local = card_of(tmp_path / "run", tmp_path / "local", "peft")
    assert "- base: tiny_llava, a folder (hash " in local
    assert ModelCard(local).data.base_model is None
    for secret in (str(tmp_path), str(goldens)):
        assert secret not in local
    meta = tmp_path / "run" / "checkpoints" / "0" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"base": "someone/llava-1.5"}))
    card = card_of(tmp_path / "run", tmp_path / "peft", "peft")
    assert ModelCard(card).data.base_model == "someone/llava-1.5"
    assert "- base: someone/llava-1.5 (hash " in card
    assert "## Use" not in card, "the run has no tokenizer, so no processor would load"


def test_what_was_not_trained_here_gets_no_card_and_a_users_own_stays(goldens, tmp_path):
    convert(str(goldens / "tiny_llava"), str(tmp_path / "hf"), "hf")
    assert not (tmp_path / "hf" / "README.md").exists()
    trained_run(tmp_path / "run", goldens / "tiny_llava", kind="lora")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    assert card_of(tmp_path / "run", tmp_path / "mine", "hf") == "mine"


def test_a_damaged_file_of_the_run_is_named_and_the_card_goes_without_it(old, tmp_path, capsys):
    whole = card_of(old, tmp_path / "whole", "hf")
    (old / "eval" / "step_00000004.json").write_text('{"step": 4, "tasks": {"general": {"loss": "low"}}}')
    card = card_of(old, tmp_path / "hf", "hf")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"^warning: .*step_00000004.json: .*general.loss is text.*; README.md goes without it$", line)
    assert len(card) < len(whole)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "kind", "to"),
    [
        ("llava_qwen2", "mole", "hf"),
        ("llava_onevision", "lora", "hf"),
        ("smolvlm", "lora", "peft"),
        ("internvl", "lora", "hf"),
    ],
)
def test_the_lines_of_a_card_give_our_answer(name, kind, to, tmp_path):
    """As they stand there, in the export's folder; only the base of a PEFT adapter is the reader's to name."""
    base = FOLDER / name
    trained_run(tmp_path / "run", base, kind=kind, prompt="checkpoint", image_aspect=None, spread=0.02)
    Tokenizer.load(base).save(str(tmp_path / "run"))
    card = card_of(tmp_path / "run", tmp_path / "out", to)
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    Image.open(base / "picture_1.png").save(tmp_path / "out" / "picture.png")
    told = by_torch(tmp_path / "out", lines.replace('BASE = "base"', f'BASE = "{os.fspath(base)}"'))
    model, processor = mole_jax.load(str(tmp_path / "run"), dtype="float32")
    decoding = DecodingConfig(max_new_tokens=32)
    (answer,) = mole_jax.generate(model, processor, "What is shown?", base / "picture_1.png", decoding=decoding)
    assert told.strip() == answer.strip()
    assert answer.strip()
