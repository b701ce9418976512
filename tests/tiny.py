"""A run small enough for tests: the synthetic domains, the embedded tokenizer and a model of a few thousand numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mole_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DecodingConfig,
    DomainConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
)
from mole_jax.synthetic import domains as synthetic

ROOT = Path(__file__).parents[1]
CHILD_FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"
"""XLA_FLAGS of processes that tests start: one device, and programs that compile fast rather than run fast."""
TOKENIZER = str(ROOT / "assets" / "quickstart_base")


def write_data(folder: Path) -> Path:
    """Writes 24 training and 8 test records per domain, and 24 captions."""
    synthetic.generate(folder, seed=0, train=24, test=8, captions=24)
    return folder


def config(folder: Path, /, **sections) -> Config:
    """Returns a small MoLE run in float32; `sections` are dicts of changes, such as ``train={"steps": 3}``."""
    base = Config(
        name="tiny",
        model=ModelConfig(
            preset="tiny", tokenizer=TOKENIZER, frozen_dtype="float32", compute_dtype="float32", remat="none"
        ),
        adapter=AdapterConfig(rank=2, alpha=4.0, dropout=0.0),
        data=DataConfig(
            domains=tuple(DomainConfig(name, str(folder / name / "train.json")) for name in synthetic.DOMAINS),
            sequence_length=96,
            examples_per_row=2,
            tiles_per_row=2,
            packing_bins=8,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0),
        train=TrainConfig(steps=6, batch_rows=8),
        mesh=MeshConfig(data=1),
        checkpoint=CheckpointConfig(every=2),
        evaluation=EvaluationConfig(
            tasks=tuple(
                TaskConfig(name, str(folder / name / "test.json"), decoding=DecodingConfig(max_new_tokens=4), limit=4)
                for name in synthetic.DOMAINS[:2]
            ),
            batch_size=4,
        ),
    )
    changed = {name: dataclasses.replace(getattr(base, name), **change) for name, change in sections.items()}
    return dataclasses.replace(base, **changed)


def write_config(file: Path, folder: Path, /, **sections) -> Path:
    """Writes a config file that a door can be started with."""
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom tests import tiny\n\n"
        f"def get_config():\n    return tiny.config(Path({str(folder)!r}), **{sections!r})\n"
    )
    return file
