"""The data-conflict study on real pictures and questions, as far as a base of this size shows anything: docs/study.md.

    python -m mole_jax.study --config configs/study_real.py --workdir runs/study_real/report

Photographs, charts and receipts, radiology: the folders of a checkout's neighbour `shared`, 425 to 450 questions each;
DATA names another place. The base is made from nothing on three other sets of that folder, so it has seen pictures and
the form of question, but none of the domains. A base like that answers mostly by habit: read the loss beside the score.
"""

import dataclasses
from pathlib import Path

from configs import study
from configs.study import DOMAINS, EACH, FAST_ROUTER, LEARNING_RATE, MIX, MOLE, TAUGHT
from mole_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DomainConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
)
from mole_jax.model.architecture import preset
from mole_jax.study.config import Base, Section, Study, equal_parameters, plain

DATA = Path("../shared/data")
FOLDER = Path("runs/study_real")
OTHERS = ("synthetic_easyvqa", "synthetic_nlvr1", "document_ocr")
"""What the base is made on."""
TEXTS = tuple(str(DATA / name / "train.json") for name in (*DOMAINS, *OTHERS))
"""What the tokenizer is made of."""
SEEDS = (10, 11, 12, 13, 14)


def base_config() -> Config:
    """Returns the run that makes the base."""
    first = setting()
    return dataclasses.replace(
        first,
        name="study-real-base",
        model=ModelConfig(
            preset="study",
            tokenizer=str(FOLDER / "tokenizer"),
            frozen_dtype="float32",
            compute_dtype="float32",
            remat="none",
        ),
        adapter=AdapterConfig(kind="none"),
        data=dataclasses.replace(
            first.data, domains=tuple(DomainConfig(name, str(DATA / name / "train.json")) for name in OTHERS)
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.05),
        train=TrainConfig(steps=1000, batch_rows=8, trainable=("vision", "projector", "decoder"), log_every=50),
        checkpoint=CheckpointConfig(every=1000, keep_last=1, keep_best=0),
        evaluation=EvaluationConfig(),
    )


def setting(router: float = LEARNING_RATE) -> Config:
    """Returns what all runs share; `router` is the routers' learning rate."""
    shared = study.setting(study.DEGREE, study.DATA_SEED, router)
    return dataclasses.replace(
        shared,
        model=dataclasses.replace(shared.model, base=str(FOLDER / "base")),
        data=dataclasses.replace(
            shared.data,
            domains=tuple(DomainConfig(name, str(DATA / name / "train.json")) for name in DOMAINS),
            # Questions of more tokens, a tenth of the documents', are skipped and counted.
            sequence_length=128,
            examples_per_row=1,
            tiles_per_row=1,
        ),
        train=dataclasses.replace(shared.train, batch_rows=4, trainable=("adapters", "router", "projector")),
        evaluation=dataclasses.replace(
            shared.evaluation,
            tasks=tuple(TaskConfig(name, str(DATA / name / "test.json")) for name in DOMAINS),
            batch_size=50,
        ),
    )


def get_study() -> Study:
    lora, equal = plain(MOLE), equal_parameters(MOLE, preset("study").decoder)
    names = {"lora": f"LoRA r={lora.rank}", "equal": f"LoRA r={equal.rank}"}
    mole = f"MoLE E={MOLE.experts} r={MOLE.rank}"
    taught = f"{mole} taught"
    return Study(
        name="real pictures and questions",
        run=setting(),
        unit_steps=200,
        seeds=SEEDS,
        sections=(
            Section("main", {**EACH, "mix": MIX}, {names["lora"]: lora}),
            Section("main", {"mix": MIX}, {names["equal"]: equal, mole: MOLE}),
            Section("main", {"mix": MIX}, {taught: TAUGHT}, run=setting(FAST_ROUTER)),
        ),
        baseline=names["lora"],
        comparisons=tuple((f"mix / {taught}", f"mix / {name}") for name in (*names.values(), mole)),
        together=5,
        bases=(Base(base_config(), str(FOLDER / "base"), texts=TEXTS),),
    )
