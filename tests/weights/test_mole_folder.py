"""The project's own adapter folder: all that was trained, and where it belongs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mole_jax.errors import UserError
from mole_jax.weights.convert import convert
from mole_jax.weights.source import open_source
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
    with pytest.raises(UserError, match=r"1 missing: decoder/layers/mlp/router/kernel; 1 unknown: decoder/spare"):
        open_source(str(tmp_path / "mole"))
    config = tmp_path / "mole" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99 is not"):
        open_source(str(tmp_path / "mole"))
