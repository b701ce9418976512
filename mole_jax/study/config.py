"""What a study consists of, and its grid of runs.

A study is a Python file with ``get_study() -> Study``. The unit of a mixture's shares is the samples of a run on one
domain alone: an arm of shares (1, 1, 1) trains three times as many steps and sees each domain as often as that one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from mole_jax.config import AdapterConfig, Config
from mole_jax.config_check import check
from mole_jax.errors import UserError, nearest
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
    prepare: Callable[[], None] | None = None
    """Makes data and base where they are not there yet."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One cell of the grid, to be run with every seed."""

    name: str
    mixture: str
    adapter: str
    shares: Shares
    config: Config
    """With the first seed."""
    sections: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^a-z0-9.+]+", "_", self.name.lower()).strip("_")

    def with_seed(self, seed: int) -> Config:
        return dataclasses.replace(self.config, seed=seed)


def arms(study: Study) -> tuple[Arm, ...]:
    """Returns the grid in the order of the sections; an arm of several sections comes once.

    Raises:
        UserError: a mixture names no domain of the data, two arms of one name differ, a config makes no sense, or a
            comparison, a curve or the baseline names what is not there.
    """
    for field, values in (("seeds", study.seeds), ("sections", study.sections)):
        if not values:
            raise UserError(f"study: {field} is empty")
    if study.together < 1 or study.unit_steps < 1:
        raise UserError(f"study: together {study.together} and unit_steps {study.unit_steps} must be at least 1")
    found: dict[str, Arm] = {}
    for section in study.sections:
        run = section.run or study.run
        for mixture, shares in section.mixtures.items():
            for adapter, settings in section.adapters.items():
                name = f"{mixture} / {adapter}"
                config = _config(study, run, name, shares, settings)
                arm = Arm(name, mixture, adapter, dict(shares), config, (section.name,))
                if (other := found.get(name)) is not None:
                    if other.config != config:
                        raise UserError(
                            f"study: sections {other.sections[0]} and {section.name} have two arms '{name}'"
                        )
                    arm = dataclasses.replace(other, sections=(*other.sections, section.name))
                found[name] = arm
    slugs = {arm.slug for arm in found.values()}
    if len(slugs) < len(found):
        raise UserError("study: two arms differ only in signs that folders' names leave out; rename one")
    named = [name for pair in study.comparisons for name in pair]
    named += [name for curve in study.curves for _, mixed, own in curve.points for name in (mixed, *own.values())]
    for name in named:
        if name not in found:
            raise UserError(f"study: no arm is named '{name}'{nearest(name, found)}")
    adapters = {arm.adapter for arm in found.values()}
    if study.baseline not in adapters:
        raise UserError(f"study: baseline '{study.baseline}' is no adapter{nearest(study.baseline, adapters)}")
    return tuple(found.values())


def _config(study: Study, run: Config, name: str, shares: Shares, adapter: AdapterConfig) -> Config:
    domains, tasks = ([one.name for one in many] for many in (run.data.domains, run.evaluation.tasks))
    for domain in domains:
        if domain not in tasks:
            raise UserError(f"study: arm '{name}': domain '{domain}' has no task of its name in evaluation.tasks")
    for domain in shares:
        if domain not in domains:
            raise UserError(f"study: arm '{name}': the data have no domain '{domain}'{nearest(domain, domains)}")
    trainable = tuple(
        group
        for group in run.train.trainable
        if (group != "router" or adapter.kind == "mole") and (group != "adapters" or adapter.kind != "none")
    )
    weighted = tuple(dataclasses.replace(one, weight=shares.get(one.name, 0.0)) for one in run.data.domains)
    changed = dataclasses.replace(
        run,
        name=name,
        seed=study.seeds[0],
        adapter=adapter,
        data=dataclasses.replace(run.data, domains=weighted, mix="weight"),
        train=dataclasses.replace(
            run.train, steps=round(study.unit_steps * sum(shares.values())), epochs=None, trainable=trainable
        ),
    )
    try:
        return check(changed)
    except UserError as error:
        raise UserError(f"study: arm '{name}': {error}") from None


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
