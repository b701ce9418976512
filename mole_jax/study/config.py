"""What a study consists of, as its file says.

A study is a Python file with ``get_study() -> Study``. The unit of a mixture's shares is the samples of a run on one
domain alone: an arm of shares (1, 1, 1) trains three times as many steps and sees each domain as often as that one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mole_jax.config import AdapterConfig, Config
from mole_jax.model.architecture import DecoderArchitecture

Shares = Mapping[str, float]
"""Samples of each domain, by its name, in units of the run on one domain alone."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the grid: every mixture with every adapter."""

    name: str
    """Heading in the report; `main` is what the finding and the conflict matrix are made of."""
    mixtures: Mapping[str, Shares]
    adapters: Mapping[str, AdapterConfig]
    run: Config | None = None
    """What its runs share, where that differs from the study's: other data, say. Its mixtures need names of their
    own. None: as the study's."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Own-domain and mixture scores over a quantity, such as the degree of conflict."""

    name: str
    axis: str
    points: tuple[tuple[float, str, Mapping[str, str]], ...]
    """Value, the mixture's arm, and by domain the arm that has it alone."""


@dataclasses.dataclass(frozen=True)
class SyntheticData:
    """Domains that are drawn before the study, unless they are there (`mole_jax.synthetic.domains.generate`)."""

    folder: str
    seed: int
    train: int
    """Training records of each domain."""
    test: int
    disagreement: float
    """Share of the names that differ between the domains."""
    captions: int = 0
    asked: float = 0.0
    """Share of the captions that answer a question."""


@dataclasses.dataclass(frozen=True)
class Base:
    """A base that is trained before the study, unless it is there."""

    config: Config
    workdir: str
    data: tuple[SyntheticData, ...] = ()
    """What `config` reads and is to be drawn first."""
    texts: tuple[str, ...] = ()
    """Files of records. From their questions and answers a tokenizer is made first, at `config.model.tokenizer`. Empty:
    it is there."""


@dataclasses.dataclass(frozen=True)
class Study:
    """The whole experiment."""

    name: str
    run: Config
    """What all runs share: base, data, optimizer, tasks. Arms set seed, adapter, domain weights and steps. The tasks
    are named like the domains."""
    unit_steps: int
    """Steps of a run on one domain alone."""
    seeds: tuple[int, ...]
    sections: tuple[Section, ...]
    baseline: str
    """The adapter that the others are compared with, by its name in the sections."""
    comparisons: tuple[tuple[str, str], ...] = ()
    """Arms (`MIXTURE / ADAPTER`) to compare seed by seed: is the first better than the second?"""
    curves: tuple[Curve, ...] = ()
    together: int = 1
    """Seeds of one arm that train at once on one device, by `jax.vmap`: faster where a run alone cannot fill it. 1: one
    run after the other, over the whole mesh, with checkpoints."""
    data: tuple[SyntheticData, ...] = ()
    """What the runs read and is to be drawn first."""
    bases: tuple[Base, ...] = ()
    """What is to be trained first, in this order."""


def equal_parameters(mole: AdapterConfig, arch: DecoderArchitecture) -> AdapterConfig:
    """Returns the plain LoRA on all seven projections whose size is nearest to that of `mole`, routers aside.

    The scale alpha / rank stays as it is.
    """
    inner, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    attention, mlp = 2 * inner + 2 * kv + 4 * arch.width, 3 * (arch.width + arch.mlp_width)
    numbers = mole.rank * attention + (mole.experts * mole.rank + mole.shared_rank) * mlp
    rank = round(numbers / (attention + mlp))
    return dataclasses.replace(plain(mole), rank=rank, alpha=mole.alpha * rank / mole.rank)


def plain(mole: AdapterConfig) -> AdapterConfig:
    """Returns the plain LoRA of the rank of `mole`."""
    return AdapterConfig(kind="lora", rank=mole.rank, alpha=mole.alpha, dropout=mole.dropout, targets=mole.targets)
