"""A small MoLE on real pictures and questions: photographs, documents and radiology, with the Llama tokenizer.

There is no pretrained base of this size, so tower, projector and decoder start from random weights and train along:
this shows the pipeline on real input and the loss falling in each domain, not a useful model. The folders are those
of a checkout's neighbour `shared`; point `--data.domains.0.path` and so on, or DATA and TOKENIZER here, elsewhere.
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

DATA = "../shared/data"
TOKENIZER = "../shared/models/llama_tokenizer"
DOMAINS = ("general", "document", "biomedical")


def get_config() -> Config:
    return Config(
        name="real-mix",
        model=ModelConfig(
            preset="small", tokenizer=TOKENIZER, frozen_dtype="float32", compute_dtype="float32", remat="none"
        ),
        adapter=AdapterConfig(kind="mole", experts=3, rank=16, alpha=32.0),
        data=DataConfig(
            domains=tuple(DomainConfig(name, f"{DATA}/{name}/train.json") for name in DOMAINS),
            mix="temperature",
            temperature=2.0,
            sequence_length=512,
            examples_per_row=4,
            tiles_per_row=4,
            packing_bins=32,
            on_too_long="skip",
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, base_learning_rate=5e-4, weight_decay=0.05),
        train=TrainConfig(epochs=1, batch_rows=8, trainable=("adapters", "router", "projector", "vision", "decoder")),
        checkpoint=CheckpointConfig(every=50),
        evaluation=EvaluationConfig(
            tasks=tuple(
                TaskConfig(name, f"{DATA}/{name}/test.json", decoding=DecodingConfig(max_new_tokens=12), limit=100)
                for name in DOMAINS
            ),
            every=25,
            batch_size=10,
        ),
    )
