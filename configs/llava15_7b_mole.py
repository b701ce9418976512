"""LLaVA-MoLE 7B on three domains that conflict: general, document, biomedical.

Numbers: LLaVA-MoLE (Chen et al. 2024, arXiv 2401.16160): one expert a domain, rank 32, alpha 64, top-1, balance loss
1e-2, LR 2e-5, batch 64. Where the paper is silent, LLaVA-1.5's LoRA recipe: dropout 0.05, cosine after 3 % warm-up.
"""

from mole_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DomainConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
)

# All in LLaVA's JSON format: its own mixture, UReader's documents, and LLaVA-Med's instructions.
DOMAINS = (
    DomainConfig(name="general", path="data/llava_v1_5_mix665k.json", image_root="data/images"),
    DomainConfig(name="document", path="data/ureader/train.jsonl", image_root="data/ureader"),
    DomainConfig(name="biomedical", path="data/llava_med/instruct_60k.json", image_root="data/llava_med/images"),
)
TASKS = (
    TaskConfig(name="general", path="data/heldout/general.json", image_root="data/images"),
    TaskConfig(name="document", path="data/heldout/document.json", image_root="data/ureader", metric="contains"),
    TaskConfig(name="biomedical", path="data/heldout/biomedical.json", image_root="data/llava_med/images"),
)


def get_config() -> Config:
    return Config(
        name="llava15-7b-mole",
        # What the backward pass of a layer keeps fits 16 GiB when a device takes one row at a time (docs/pods.md).
        model=ModelConfig(base="llava-hf/llava-1.5-7b-hf", remat="most"),
        adapter=AdapterConfig(
            kind="mole",
            experts=len(DOMAINS),
            rank=32,
            alpha=64.0,
            dropout=0.05,
            # Taken literally, the paper's router learns from the balance loss alone; this choice lets the
            # language-model loss reach it and leaves the forward pass as published.
            router_gradient="straight_through",
            balance_weight=1e-2,
        ),
        # Every domain as often as the others, whatever its size; the domains' weights change that.
        data=DataConfig(domains=DOMAINS, mix="weight", sequence_length=2048),
        optimizer=OptimizerConfig(learning_rate=2e-5),
        # The paper's batch is 64 examples. Rows are packed: at about 1,000 positions an example (576 are its image's),
        # 32 rows of 2,048 hold as many.
        train=TrainConfig(epochs=1.0, batch_rows=32, accumulation=2),
        mesh=MeshConfig(data=-1, fsdp=8),
        checkpoint=CheckpointConfig(every=500),
        evaluation=EvaluationConfig(tasks=TASKS, every=500),
    )
