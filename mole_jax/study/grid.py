"""The grid of a study: one arm for every mixture with every adapter, and how `study.json` has it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mole_jax.config import AdapterConfig, Config
from mole_jax.config_check import check
from mole_jax.errors import UserError, nearest
from mole_jax.study.config import Curve, Section, Shares, Study

MAIN = "main"
"""The section that the study is about."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One cell of the grid, to be run with every seed."""

    name: str
    """`MIXTURE / ADAPTER`."""
    slug: str
    """The name as a folder's."""
    mixture: str
    adapter: str
    shares: Shares
    """Without zeros."""
    steps: int
    trainable: int | None
    """Numbers that are trained; None until the base is there, which tells its size."""
    kind: str
    """lora, mole or none."""
    experts: int
    sections: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is to be run and to be compared.

    Raises:
        ValueError: two arms have one name or one folder; a comparison, a curve or the baseline names what is not there.
    """

    name: str
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    """In the order of the sections."""
    baseline: str
    """The adapter that the others are compared with."""
    comparisons: tuple[tuple[str, str], ...]
    """Pairs of arms, by name."""
    curves: tuple[Curve, ...]
    score: str
    """The tasks' metrics."""

    def __post_init__(self) -> None:
        for field in ("name", "slug"):
            values = [getattr(arm, field) for arm in self.arms]
            if len(set(values)) < len(values):
                what = "have one name" if field == "name" else "differ only in signs that folders' names leave out"
                raise ValueError(f"two arms {what}; rename one")
        for name in (name for pair in self.comparisons for name in pair):
            self.arm(name)
        for curve in self.curves:
            for value, mixture, own in curve.points:
                if set(own) != set(self.domains):
                    raise ValueError(f"curve '{curve.name}' at {value:g} needs one arm for each domain alone")
                for name in (mixture, *own.values()):
                    self.arm(name)
        adapters = {arm.adapter for arm in self.arms}
        if self.baseline not in adapters:
            raise ValueError(f"baseline '{self.baseline}' is no adapter{nearest(self.baseline, adapters)}")

    @property
    def planned(self) -> int:
        """Runs that the grid has."""
        return len(self.arms) * len(self.seeds)

    def arm(self, name: str) -> Arm:
        """Returns the arm of this name; raises `ValueError` if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"no arm is named '{name}'{nearest(name, [arm.name for arm in self.arms])}")

    def section(self, name: str) -> tuple[Arm, ...]:
        """Returns the arms of a section."""
        return tuple(arm for arm in self.arms if name in arm.sections)

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` takes."""
        points = [
            [
                {"value": at, "mixture": mixture, "own": [own[name] for name in self.domains]}
                for at, mixture, own in many
            ]
            for many in (curve.points for curve in self.curves)
        ]
        return dataclasses.asdict(self) | {
            "comparisons": [{"a": a, "b": b} for a, b in self.comparisons],
            "curves": [
                {"name": curve.name, "axis": curve.axis, "points": found}
                for curve, found in zip(self.curves, points, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Grid:
        """Returns the grid of a `study.json`.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        domains = tuple(found["domains"])

        def curve(entry: Mapping[str, Any]) -> Curve:
            points = [
                (float(point["value"]), point["mixture"], dict(zip(domains, point["own"], strict=True)))
                for point in entry["points"]
            ]
            return Curve(entry["name"], entry["axis"], tuple(points))

        return cls(
            name=found["name"],
            domains=domains,
            seeds=tuple(found["seeds"]),
            arms=tuple(map(_arm, found["arms"])),
            baseline=found["baseline"],
            comparisons=tuple((pair["a"], pair["b"]) for pair in found["comparisons"]),
            curves=tuple(map(curve, found["curves"])),
            score=found["score"],
        )


def lay_out(study: Study) -> tuple[Grid, dict[str, Config]]:
    """Returns the grid, and by an arm's name the config of its run with the first seed.

    An arm of several sections comes once.

    Raises:
        UserError: a mixture names no domain of the data, two arms of one name differ, a config makes no sense, or a
            comparison, a curve or the baseline names what is not there.
    """
    for field, values in (("seeds", study.seeds), ("sections", study.sections)):
        if not values:
            raise UserError(f"study: {field} is empty")
    if study.together < 1 or study.unit_steps < 1:
        raise UserError(f"study: together {study.together} and unit_steps {study.unit_steps} must be at least 1")
    arms: dict[str, Arm] = {}
    configs: dict[str, Config] = {}
    for section, mixture, adapter in _cells(study):
        name = f"{mixture} / {adapter}"
        config = _config(study, section, name, section.mixtures[mixture], section.adapters[adapter])
        if name not in arms:
            shares = {domain: float(share) for domain, share in section.mixtures[mixture].items() if share}
            arms[name] = _new_arm(
                name=name, mixture=mixture, adapter=adapter, shares=shares, config=config, section=section
            )
        elif configs[name] == config:
            arms[name] = dataclasses.replace(arms[name], sections=(*arms[name].sections, section.name))
        else:
            other = arms[name].sections[0]
            raise UserError(f"study: sections {other} and {section.name} have two arms '{name}'")
        configs[name] = config
    try:
        grid = Grid(
            name=study.name,
            domains=tuple(domain.name for domain in study.run.data.domains),
            seeds=study.seeds,
            arms=tuple(arms.values()),
            baseline=study.baseline,
            comparisons=study.comparisons,
            curves=study.curves,
            score=", ".join(sorted({task.metric for task in study.run.evaluation.tasks})),
        )
    except ValueError as error:
        raise UserError(f"study: {error}") from None
    return grid, configs


def _cells(study: Study) -> Iterator[tuple[Section, str, str]]:
    """Yields section, name of a mixture and name of an adapter."""
    for section in study.sections:
        for mixture in section.mixtures:
            for adapter in section.adapters:
                yield section, mixture, adapter


def _new_arm(name: str, mixture: str, adapter: str, shares: Shares, config: Config, section: Section) -> Arm:
    assert config.train.steps is not None
    return Arm(
        name=name,
        slug=re.sub(r"[^a-z0-9.+]+", "_", name.lower()).strip("_"),
        mixture=mixture,
        adapter=adapter,
        shares=shares,
        steps=config.train.steps,
        trainable=None,
        kind=config.adapter.kind,
        experts=config.adapter.experts,
        sections=(section.name,),
    )


def _config(study: Study, section: Section, name: str, shares: Shares, adapter: AdapterConfig) -> Config:
    run = section.run or study.run
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
    steps = round(study.unit_steps * sum(shares.values()))
    changed = dataclasses.replace(
        run,
        name=name,
        seed=study.seeds[0],
        adapter=adapter,
        data=dataclasses.replace(run.data, domains=weighted, mix="weight"),
        train=dataclasses.replace(run.train, steps=steps, epochs=None, trainable=trainable),
    )
    try:
        return check(changed)
    except UserError as error:
        raise UserError(f"study: arm '{name}': {error}") from None


def _arm(entry: Mapping[str, Any]) -> Arm:
    known = {field.name: entry[field.name] for field in dataclasses.fields(Arm)}
    shares = {domain: float(share) for domain, share in entry["shares"].items() if share}
    return Arm(**known | {"shares": shares, "sections": tuple(entry["sections"])})
