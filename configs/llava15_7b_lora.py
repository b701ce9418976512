"""LLaVA-1.5 7B with plain LoRA on its own instruction data.

Numbers: LLaVA-1.5's LoRA recipe (`finetune_lora.sh`): rank 128, alpha 256, dropout 0.05 on every linear of the
language model but the head, LR 2e-4, projector 2e-5, batch 128, one epoch of 665k, cosine after 3 % warm-up.
"""

from mole_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DomainConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="llava15-7b-lora",
        model=ModelConfig(base="llava-hf/llava-1.5-7b-hf"),
        adapter=AdapterConfig(kind="lora", rank=128, alpha=256.0, dropout=0.05),
        data=DataConfig(
            domains=(DomainConfig(name="general", path="data/llava_v1_5_mix665k.json", image_root="data/images"),),
            sequence_length=2048,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-4, projector_learning_rate=2e-5),
        # LLaVA's batch is 128 examples. Rows are packed: at about 1,000 positions an example (576 are its image's),
        # 64 rows of 2,048 hold as many.
        train=TrainConfig(epochs=1.0, batch_rows=64, trainable=("adapters", "projector")),
        mesh=MeshConfig(data=-1, fsdp=8),
        checkpoint=CheckpointConfig(every=500),
    )
