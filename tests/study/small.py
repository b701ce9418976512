"""A study small enough for tests: two mixtures, two adapters, two seeds and a base of random weights."""

from __future__ import annotations

import json
from pathlib import Path

from etils import epath

from mole_jax.config import AdapterConfig, MeshConfig, TaskConfig
from mole_jax.model.architecture import PRESETS
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.study.config import Section, Study, plain
from mole_jax.synthetic.domains import DOMAINS
from mole_jax.weights.open import place
from mole_jax.weights.run import Meta, write_params
from mole_jax.weights.sources import RandomSource
from tests import tiny

ALL = ("vision", "projector", "decoder")
MOLE = AdapterConfig(experts=2, rank=2, alpha=4.0, dropout=0.1)


def write(folder: Path) -> Path:
    """Writes data/ and base/, a run's folder with random weights."""
    tiny.write_data(folder / "data")
    arch, none = PRESETS["tiny"], AdapterConfig(kind="none")
    source, spec = RandomSource(arch, 0), ModelSpec.of(arch, none)
    leaves = place(spec, source, make_mesh(MeshConfig(data=1)), ALL, "float32", 0)
    meta = Meta(arch, none, ALL, None, None, None, source.content_hash(), 0)
    write_params(epath.Path(folder / "base"), leaves, meta)
    return folder


def study(folder: Path, **changes) -> Study:
    """Returns the study on what `write` has written; `changes` are fields of `Study`, `run` sections of its config."""
    tasks = tuple(TaskConfig(name, str(folder / "data" / name / "test.json")) for name in DOMAINS)
    sections = {
        "model": {"base": str(folder / "base"), "preset": None},
        "train": {"batch_rows": 4, "trainable": ("adapters", "router")},
        "evaluation": {"generate": False, "at_start": False, "batch_size": 8, "tasks": tasks},
    }
    for name, fields in changes.pop("run", {}).items():
        sections[name] = sections.get(name, {}) | fields
    mixtures = {"alone": {"general": 1.0}, "mix": {"general": 1.0, "document": 0.5}}
    main = Section("main", mixtures, {"LoRA": plain(MOLE), "MoLE": MOLE})
    settings = {"unit_steps": 4, "seeds": (3, 5), "sections": (main,), "baseline": "LoRA", "together": 2}
    return Study(name="tiny", run=tiny.config(folder / "data", **sections), **settings | changes)


def evaluation(workdir, slug: str, seed: int) -> dict:
    """Returns the last result of a run."""
    file = max((workdir / "runs" / slug / f"seed_{seed}" / "eval").glob("step_*.json"))
    return json.loads(file.read_text())
