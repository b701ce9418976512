"""Pretrains the small LLaVA that the repository carries (assets/quickstart_base), from nothing.

It learns to see and to name what is in the pictures from captions; it is never taught the three domains'
instructions. Made in about an hour on two CPU cores with

    python -m mole_jax.synthetic --output runs/base/data --seed 7 --train 10 --test 10 --captions 40000
    python -m mole_jax.train --config configs/quickstart_base.py --workdir runs/base/run
    python -m mole_jax.convert --input runs/base/run --output assets/quickstart_base --to hf
"""

from mole_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DecodingConfig,
    DomainConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
)

DATA = "runs/base/data/captions"


def get_config() -> Config:
    return Config(
        name="quickstart-base",
        model=ModelConfig(
            preset="quickstart",
            tokenizer="assets/quickstart_base",
            frozen_dtype="float32",
            compute_dtype="float32",
            remat="none",
        ),
        adapter=AdapterConfig(kind="none"),
        data=DataConfig(
            domains=(DomainConfig("captions", f"{DATA}/train.json"),),
            sequence_length=384,
            examples_per_row=4,
            tiles_per_row=3,
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, weight_decay=0.05, warmup_fraction=0.05),
        train=TrainConfig(
            steps=2000,
            batch_rows=16,
            trainable=("vision", "projector", "decoder"),
            log_every=10,
        ),
        checkpoint=CheckpointConfig(every=250, keep_last=1, keep_best=0),
        evaluation=EvaluationConfig(
            tasks=(TaskConfig("captions", f"{DATA}/test.json", decoding=DecodingConfig(max_new_tokens=40)),),
            every=250,
            generate=True,
        ),
    )
