"""What an earlier version wrote (tests/goldens/old_run) still opens, also where models have got a new setting."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from mole_jax import config as configuration
from mole_jax.config import AdapterConfig
from mole_jax.config_json import identity, identity_json
from mole_jax.model import architecture
from mole_jax.model.architecture import PRESETS, DecoderArchitecture, LlavaArchitecture
from mole_jax.weights import run
from mole_jax.weights.convert import convert
from mole_jax.weights.open import open_source
from mole_jax.weights.sources import RandomSource
from tests.weights.runs import leaves_of


@pytest.fixture
def old(goldens):
    return goldens / "old_run"


@pytest.fixture
def facts(old):
    return json.loads((old / "facts.json").read_text())["content_hash"]


def grown(kind: type, **default):
    """Returns `kind` with one more field, as the next version may have it."""
    ((name, value),) = default.items()
    field = (name, type(value).__name__, dataclasses.field(default=value))
    return dataclasses.make_dataclass(kind.__name__, [field], bases=(kind,), frozen=True, module=kind.__module__)


@pytest.fixture(params=[False, True], ids=["this version", "the next one"])
def version(request, monkeypatch):
    """The classes as they are, and with a new field in the adapters, the decoder and the whole."""
    if request.param:
        adapter = grown(AdapterConfig, rotate=False)
        decoder = grown(DecoderArchitecture, norm_queries=False)
        whole = grown(LlavaArchitecture, tiles=1)
        monkeypatch.setattr(configuration, "AdapterConfig", adapter)
        monkeypatch.setattr(run, "AdapterConfig", adapter)
        monkeypatch.setattr(architecture, "DecoderArchitecture", decoder)
        monkeypatch.setattr(run, "LlavaArchitecture", whole)
    return request.param


def test_content_hashes_are_those_of_the_earlier_version(old, facts, version):
    for name in ("run/checkpoints/4", "run/base"):
        source = open_source(str(old / name))
        assert hasattr(source.adapter, "rotate") == hasattr(source.architecture, "tiles") == version
        assert hasattr(source.architecture.decoder, "norm_queries") == version
        assert source.content_hash() == facts[name], name
    adapters = open_source(str(old / "adapters"), base=str(old / "run" / "base"))
    assert hasattr(adapters.adapter, "rotate") == version
    assert adapters.content_hash() == facts["adapters"]


@pytest.mark.parametrize(("preset", "seed"), [("tiny", 0), ("quickstart", 3)])
def test_random_bases_keep_their_hash(facts, preset, seed):
    arch = PRESETS[preset]
    assert RandomSource(arch, seed).content_hash() == facts[f"preset {preset}, seed {seed}"]
    decoder = grown(DecoderArchitecture, norm_queries=False)(**dataclasses.asdict(arch.decoder))
    later = dataclasses.replace(arch, decoder=decoder)
    assert RandomSource(later, seed).content_hash() == facts[f"preset {preset}, seed {seed}"]
    other = dataclasses.replace(later, decoder=dataclasses.replace(decoder, norm_queries=True))
    assert RandomSource(other, seed).content_hash() != facts[f"preset {preset}, seed {seed}"]


def test_the_run_loads_over_its_base_and_is_converted(old, tmp_path, version):
    """Placing reads the base, whose hash the run keeps."""
    shutil.copytree(old / "run", tmp_path / "run")
    spec, leaves = leaves_of(tmp_path / "run")
    assert leaves.keys() == spec.declarations.keys()
    own = open_source(str(tmp_path / "run"))
    assert np.any(leaves["decoder/layers/mlp/up_proj/adapter/b"])
    assert own.base.content_hash() == own.base_hash
    convert(str(tmp_path / "run"), str(tmp_path / "mixtral"), "hf")
    assert (tmp_path / "mixtral" / "config.json").exists()


def test_a_new_setting_that_is_used_is_part_of_the_identity():
    kind = grown(AdapterConfig, rotate=False)
    assert identity(kind()) == identity(AdapterConfig())
    assert identity(kind(rotate=True)) == identity(AdapterConfig())[:-1] + ", rotate=True)"
    assert identity(AdapterConfig(shared_rank=2)) != identity(AdapterConfig())
    arch = PRESETS["tiny"]
    first = (
        "LlavaArchitecture(vision=VisionArchitecture(width=32, mlp_width=64, layers=2, heads=2, image_size=28, "
        "patch_size=14, norm_eps=1e-05, activation='quick_gelu'), decoder=DecoderArchitecture(vocab=512, width=32, "
        "mlp_width=64, layers=2, heads=4, kv_heads=2, head_dim=8, max_position=512, rope_theta=10000.0, "
        "rope_scaling=None, norm_eps=1e-05, tied_head=False, bos_id=1, eos_id=2, pad_id=0), image_token_id=511, "
        "feature_layer=-2, feature_select='patch', image_vectors=False)"
    )
    assert identity(arch) == first, "what the first version had is written at its default too"
    values = identity_json(arch)
    assert list(values) == ["vision", "decoder", "image_token_id", "feature_layer", "feature_select", "image_vectors"]
    assert "other_eos_ids" not in values["decoder"]
    assert "class_token" not in values["vision"]
    assert values["decoder"].items() <= dataclasses.asdict(arch.decoder).items()
    assert values["vision"].items() <= dataclasses.asdict(arch.vision).items()
