"""The main job in small: three synthetic domains that conflict, one small LLaVA, a mixture of LoRA experts.

`make quickstart` makes the data and the base that this config names, and runs it.
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

DATA = "runs/quickstart/data"
DOMAINS = ("general", "document", "biomedical")


def get_config() -> Config:
    return Config(
        name="quickstart",
        model=ModelConfig(base="runs/quickstart/base", frozen_dtype="float32", compute_dtype="float32", remat="none"),
        adapter=AdapterConfig(kind="mole", experts=3, rank=16, alpha=32.0),
        data=DataConfig(
            domains=tuple(DomainConfig(name, f"{DATA}/{name}/train.json") for name in DOMAINS),
            sequence_length=256,
            examples_per_row=2,
            tiles_per_row=2,
        ),
        # A small model takes larger steps than the 7B recipes do.
        optimizer=OptimizerConfig(learning_rate=3e-3, projector_learning_rate=1e-3),
        train=TrainConfig(steps=200, batch_rows=16),
        checkpoint=CheckpointConfig(every=50),
        evaluation=EvaluationConfig(
            tasks=tuple(
                TaskConfig(name, f"{DATA}/{name}/test.json", decoding=DecodingConfig(max_new_tokens=24))
                for name in DOMAINS
            ),
            batch_size=50,
        ),
    )
