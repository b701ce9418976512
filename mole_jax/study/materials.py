"""Makes what a study needs and what is not there yet: data, tokenizer and bases."""

from __future__ import annotations

import dataclasses

from mole_jax.files import absolute, read_json
from mole_jax.study.config import Base, Study
from mole_jax.synthetic.domains import generate
from mole_jax.synthetic.vocabulary import train_tokenizer
from mole_jax.training.loop import train
from mole_jax.weights.run import latest_step


def make(study: Study) -> None:
    """Draws the data of the study and trains its bases; what is there already stays as it is.

    Raises:
        UserError: a base cannot be trained, a file of texts cannot be read, or a folder holds something else.
    """
    for data in study.data:
        generate(**dataclasses.asdict(data))
    for base in study.bases:
        _train(base)


def _train(base: Base) -> None:
    workdir = absolute(base.workdir)
    if latest_step(workdir) == base.config.train.steps:
        return
    for data in base.data:
        generate(**dataclasses.asdict(data))
    if base.texts:
        assert base.config.model.tokenizer is not None
        records = [record for path in base.texts for record in read_json(path, [dict])]
        texts = [text for record in records for text in (record["question"], record["answer"])]
        train_tokenizer(texts, base.config.model.tokenizer)
    train(base.config, workdir)
