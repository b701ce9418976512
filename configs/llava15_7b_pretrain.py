"""LLaVA-1.5 7B, first stage: align the projector with captions; vision tower and language model stay frozen.

Numbers: LLaVA-1.5's pretraining (Liu et al. 2023, arXiv 2310.03744): 558k captions, one epoch, batch 256, LR 1e-3,
cosine after 3 % warm-up, no weight decay, images cropped to the centre, prompt `plain` (image, caption, newline).

The base, Vicuna and CLIP with a new projector between them, is made once:

    python -m mole_jax.convert --input lmsys/vicuna-7b-v1.5 --vision openai/clip-vit-large-patch14-336 \\
        --output checkpoints/vicuna-7b-clip-l-336 --to hf
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
        name="llava15-7b-pretrain",
        model=ModelConfig(base="checkpoints/vicuna-7b-clip-l-336"),
        adapter=AdapterConfig(kind="none"),
        data=DataConfig(
            domains=(
                DomainConfig(
                    name="captions",
                    path="data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
                    image_root="data/LLaVA-Pretrain/images",
                ),
            ),
            prompt="plain",
            image_aspect="crop",
            sequence_length=2048,
            # A caption takes about 600 positions, 576 of them its image: three fit a row.
            examples_per_row=4,
            tiles_per_row=3,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        # Batch 256 in LLaVA is examples; 88 rows of three examples hold about as many, and divide among 8 devices.
        train=TrainConfig(epochs=1.0, batch_rows=88, trainable=("projector",)),
        mesh=MeshConfig(data=-1, fsdp=8),
        checkpoint=CheckpointConfig(every=500),
    )
