"""Pretrains the base of the study (configs/study.py) from nothing, on captions; configs/study_questions.py goes on."""

from mole_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DomainConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
)
from mole_jax.study.config import SyntheticData

FOLDER = "runs/study/captions"
TOKENIZER = "runs/study/tokenizer"
DATA = SyntheticData(FOLDER, seed=7, train=8, test=100, disagreement=0.0, captions=24_000)
TEXTS = tuple(
    f"{FOLDER}/{name}/{split}.json"
    for name in ("biomedical", "captions", "document", "general")
    for split in ("test", "train")
)
"""What the tokenizer is made of."""


def get_config() -> Config:
    return Config(
        name="study-captioner",
        model=ModelConfig(
            preset="study",
            tokenizer=TOKENIZER,
            frozen_dtype="float32",
            compute_dtype="float32",
            remat="none",
        ),
        adapter=AdapterConfig(kind="none"),
        data=DataConfig(
            domains=(DomainConfig("captions", f"{FOLDER}/captions/train.json"),),
            prompt="no_system",
            sequence_length=128,
            examples_per_row=3,
            tiles_per_row=3,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.05, warmup_fraction=0.05),
        train=TrainConfig(steps=3000, batch_rows=24, trainable=("vision", "projector", "decoder"), log_every=20),
        checkpoint=CheckpointConfig(every=1000, keep_last=1, keep_best=0),
        evaluation=EvaluationConfig(
            tasks=(TaskConfig("captions", f"{FOLDER}/captions/test.json"),), at_start=False, every=500, generate=False
        ),
    )
