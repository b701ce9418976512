"""The project's own adapter folder: all that was trained, and where it belongs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mole_jax
from mole_jax.errors import UserError
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.convert import convert
from mole_jax.weights.open import open_source
from tests.tiny import ROOT, TOKENIZER
from tests.weights.runs import leaves_of, trained_run


@pytest.mark.parametrize(
    "settings", [{"kind": "mole", "router_bias": True, "router_gradient": "dense"}, {"kind": "lora"}]
)
def test_out_and_in_is_bit_exact_with_all_settings(goldens, tmp_path, settings):
    spec, leaves = trained_run(
        tmp_path / "run", goldens / "tiny_llava", arch={"image_vectors": True}, prompt="llava_mole", **settings
    )
    convert(str(tmp_path / "run"), str(tmp_path / "mole"), "mole")
    stored = load_file(tmp_path / "mole" / "adapter_model.safetensors")
    assert "decoder.layers.mlp.up_proj.kernel" not in stored, "the base stays behind"
    convert(str(tmp_path / "mole"), str(tmp_path / "again"), "run")
    for name in ("mole", "again"):
        source = open_source(str(tmp_path / name))
        assert (source.adapter, source.architecture) == (spec.adapter, spec.arch)
        assert (source.prompt, source.image_aspect) == ("llava_mole", "pad")
        _, loaded = leaves_of(tmp_path / name)
        assert loaded.keys() == leaves.keys()
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)


def test_it_belongs_to_one_base(goldens, tmp_path):
    trained_run(tmp_path / "run", goldens / "tiny_llava", kind="mole")
    convert(str(tmp_path / "run"), str(tmp_path / "mole"), "mole")
    shutil.copytree(goldens / "tiny_llava", tmp_path / "moved")
    assert open_source(str(tmp_path / "mole"), base=str(tmp_path / "moved")).base_name == str(tmp_path / "moved")
    with pytest.raises(UserError, match=r"was trained on another base than .*tiny_llava_gqa now holds"):
        open_source(str(tmp_path / "mole"), base=str(goldens / "tiny_llava_gqa"))
    with pytest.raises(UserError, match=r"carries mole adapters itself; give the base"):
        open_source(str(tmp_path / "mole"), base=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"already holds a model"):
        convert(str(tmp_path / "run"), str(tmp_path / "mole"), "mole")

    file = tmp_path / "mole" / "adapter_model.safetensors"
    whole = load_file(file)
    part = {name: value for name, value in whole.items() if "router" not in name}
    save_file(part | {"decoder.spare": np.ones(2, np.float32)}, file)
    with pytest.raises(UserError, match=r"1 missing: decoder.layers.mlp.router.kernel; 1 unknown: decoder.spare"):
        open_source(str(tmp_path / "mole"))
    config = tmp_path / "mole" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99 is not"):
        open_source(str(tmp_path / "mole"))


def test_the_door_and_the_tokenizer_that_travels_along(tmp_path):
    trained_run(tmp_path / "run", TOKENIZER, kind="mole", router_bias=True)
    Tokenizer.load(TOKENIZER).save(str(tmp_path / "run"))

    def door(*flags):
        command = [sys.executable, "-m", "mole_jax.convert", "--input", str(tmp_path / "run"), *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = door("--output", str(tmp_path / "mole"), "--to", "mole")
    assert done.returncode == 0, done.stderr
    assert "numbers as float32" in done.stdout
    assert open_source(str(tmp_path / "mole")).tokenizer == str(tmp_path / "mole")
    model, processor = mole_jax.load(str(tmp_path / "mole"))
    assert model.decoder.layers.mlp.router.bias is not None
    assert processor.prompt == "v1"

    refused = door("--output", str(tmp_path / "hf"), "--to", "hf")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "its router has a bias" in refused.stderr
