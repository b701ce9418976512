"""The data-conflict study at a scale that two CPU cores manage: docs/study.md.

    python -m mole_jax.study --config configs/study.py --workdir runs/study/report

makes the base and the data, and runs and reports the study: hours from nothing.
"""

import dataclasses
import itertools
from pathlib import Path

from configs import study_base, study_questions
from mole_jax.config import (
    AdapterConfig,
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
from mole_jax.model.architecture import preset
from mole_jax.study.config import Base, Curve, Section, Study, SyntheticData, equal_parameters, plain

FOLDER = Path("runs/study")
DOMAINS = ("general", "document", "biomedical")
EACH = {name: {name: 1.0} for name in DOMAINS}
MIX = dict.fromkeys(DOMAINS, 1.0)
OTHERS = {
    **{f"{a}+{b}": {a: 1.0, b: 1.0} for a, b in itertools.combinations(DOMAINS, 2)},
    "2:1:1": dict(zip(DOMAINS, (2.0, 1.0, 1.0), strict=True)),
}
"""Pairs, and an uneven mixture."""

SEEDS = (10, 11, 12, 13, 14)
"""None of those that the defaults were chosen on (configs/study_choice.py); nor are the data."""
DATA_SEED = 2
DEGREES = (0.0, 0.5, 1.0)
DEGREE = 0.5
"""The degree of the main part, fixed by plain LoRA's curve alone."""

MOLE = AdapterConfig(kind="mole", experts=3, rank=4, alpha=8.0, dropout=0.0)
TAUGHT = dataclasses.replace(MOLE, route_by="instance", balance_weight=0.0, domain_weight=1.0)
"""What configs/study_choice.py came to: one choice for an example, by routers that are taught the domains."""
LEARNING_RATE = 5e-3
FAST_ROUTER = 10 * LEARNING_RATE
"""Learning rate of the routers of `TAUGHT`."""


def data_folder(degree: float, seed: int) -> Path:
    return FOLDER / f"data_{degree:g}_{seed}"


def setting(degree: float, seed: int, router: float = LEARNING_RATE) -> Config:
    """Returns what all runs on the domains that conflict to this degree share; `router` is its learning rate."""
    folder = data_folder(degree, seed)
    return Config(
        model=ModelConfig(base=str(FOLDER / "base"), frozen_dtype="float32", compute_dtype="float32", remat="none"),
        data=DataConfig(
            domains=tuple(DomainConfig(name, str(folder / name / "train.json")) for name in DOMAINS),
            prompt="no_system",
            sequence_length=96,
            examples_per_row=2,
            tiles_per_row=2,
        ),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, router_learning_rate=router),
        train=TrainConfig(batch_rows=2, trainable=("adapters", "router"), log_every=50),
        mesh=MeshConfig(data=1),
        evaluation=EvaluationConfig(
            tasks=tuple(TaskConfig(name, str(folder / name / "test.json")) for name in DOMAINS),
            generate=False,
            at_start=False,
            batch_size=100,
        ),
    )


def data(degrees: tuple[float, ...], seed: int) -> tuple[SyntheticData, ...]:
    """Returns the domains that conflict to these degrees."""
    return tuple(
        SyntheticData(str(data_folder(degree, seed)), seed=seed, train=2000, test=200, disagreement=degree)
        for degree in degrees
    )


def bases() -> tuple[Base, ...]:
    """Returns the captioner and the base that is made of it."""
    captioner, base = study_base.get_config(), study_questions.get_config()
    return (
        Base(captioner, str(FOLDER / "captioner"), data=(study_base.DATA,), texts=study_base.TEXTS),
        Base(base, str(FOLDER / "base"), data=(study_questions.DATA,)),
    )


def get_study() -> Study:
    lora, equal = plain(MOLE), equal_parameters(MOLE, preset("study").decoder)
    names = {"lora": f"LoRA r={MOLE.rank}", "equal": f"LoRA r={equal.rank}"}
    mole = f"MoLE E={MOLE.experts} r={MOLE.rank}"
    taught = f"{mole} taught"
    sections = [
        Section("main", {**EACH, "mix": MIX}, {names["lora"]: lora}),
        Section("main", {"mix": MIX}, {names["equal"]: equal, mole: MOLE}),
        Section("main", {"mix": MIX}, {taught: TAUGHT}, run=setting(DEGREE, DATA_SEED, FAST_ROUTER)),
        Section("main", {"twice": dict.fromkeys(DOMAINS, 2.0)}, {names["lora"]: lora}),
    ]
    points: dict[str, list] = {names["lora"]: [], taught: []}
    for degree in DEGREES:
        names_of = {name: name if degree == DEGREE else f"{name} at {degree:g}" for name in (*DOMAINS, "mix")}
        if degree != DEGREE:
            mixtures = {names_of[name]: EACH.get(name, MIX) for name in names_of}
            sections += [
                Section("conflict", mixtures, {names["lora"]: lora}, run=setting(degree, DATA_SEED)),
                Section(
                    "conflict", {names_of["mix"]: MIX}, {taught: TAUGHT}, run=setting(degree, DATA_SEED, FAST_ROUTER)
                ),
            ]
        own = {name: f"{names_of[name]} / {names['lora']}" for name in DOMAINS}
        for adapter, found in points.items():
            found.append((degree, f"{names_of['mix']} / {adapter}", own))
    sections.append(Section("other mixtures", OTHERS, {names["lora"]: lora}))
    return Study(
        name="three domains that conflict",
        run=setting(DEGREE, DATA_SEED),
        unit_steps=500,
        seeds=SEEDS,
        sections=tuple(sections),
        baseline=names["lora"],
        comparisons=(
            (f"mix / {taught}", f"mix / {names['lora']}"),
            (f"mix / {taught}", f"mix / {names['equal']}"),
            (f"mix / {taught}", f"twice / {names['lora']}"),
            (f"mix / {mole}", f"mix / {names['lora']}"),
        ),
        curves=tuple(
            Curve(f"{adapter} over conflict", "share of names that the domains disagree on", tuple(found))
            for adapter, found in points.items()
        ),
        together=5,
        data=data(DEGREES, DATA_SEED),
        bases=bases(),
    )
