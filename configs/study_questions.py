"""Teaches the captioner of configs/study_base.py to answer questions, in no domain's form: the base of the study."""

import dataclasses

from configs import study_base
from mole_jax.config import Config, DomainConfig, ModelConfig, TaskConfig
from mole_jax.study.config import SyntheticData

FOLDER = "runs/study/questions"
DATA = SyntheticData(FOLDER, seed=8, train=8, test=100, disagreement=0.0, captions=16_000, asked=0.8)


def get_config() -> Config:
    first = study_base.get_config()
    return dataclasses.replace(
        first,
        name="study-base",
        model=ModelConfig(base="runs/study/captioner", frozen_dtype="float32", compute_dtype="float32", remat="none"),
        data=dataclasses.replace(first.data, domains=(DomainConfig("captions", f"{FOLDER}/captions/train.json"),)),
        optimizer=dataclasses.replace(first.optimizer, learning_rate=1e-3),
        train=dataclasses.replace(first.train, steps=700),
        evaluation=dataclasses.replace(
            first.evaluation, tasks=(TaskConfig("captions", f"{FOLDER}/captions/test.json"),), every=350
        ),
    )
