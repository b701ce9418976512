"""Other meshes, pieces and remat policies for the same update: the most promising are compiled, best first."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from mole_jax.config import Config, MeshConfig, Remat
from mole_jax.errors import UserError
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parallel.devices import Chip, chip_of
from mole_jax.planning.compile import architecture_of
from mole_jax.planning.predict import DEPTHS, Prediction, predict
from mole_jax.planning.topology import devices_of
from mole_jax.planning.work import Work, work_of

ROWS_PER_DEVICE = (1, 2, 4, 8)
"""Of a piece of the batch, that is at a time."""
MOST_TENSOR = 8
"""Devices of a host: sums of activations over more of them leave the fastest links."""


def sweep(
    config: Config,
    topology: str,
    *,
    cache: Path,
    limit: int,
    preset: str | None = None,
    depths: tuple[int, int] = DEPTHS,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Prediction], int]:
    """Compiles the config and the `limit` candidates of the best rough estimate.

    Args:
        say: is told each candidate before it is compiled, which takes minutes.

    Returns:
        The predictions, best first (those that fit, then by tokens/s, then by memory), and how many candidates there
        were that fit by estimate.

    Raises:
        UserError: as `predict` for the config itself; of a candidate that the model refuses, `say` is told why.
    """
    arch = architecture_of(config, preset)
    devices = devices_of(topology)
    chip = chip_of(devices[0])
    works = work_of(config, arch, devices[0])

    def guess(one: Config) -> tuple[float, float]:
        return estimate(one, arch, len(devices), chip, works[one.model.remat])

    ranked = sorted(candidates(config, arch, len(devices)), key=lambda one: guess(one)[0])
    roomy = [one for one in ranked if fits(guess(one)[1], chip)]
    found = []
    for number, one in enumerate([config, *(one for one in roomy if one != config)][: limit + 1]):
        mesh = dataclasses.replace(one.mesh, data=len(devices) // inner_size(one.mesh))
        rows = f"{one.train.batch_rows} rows in {one.train.accumulation} piece(s)"
        say(f"{number + 1} of {min(limit, len(roomy)) + 1}: {mesh}, {rows}, {one.model.remat}")
        try:
            found.append(predict(one, topology, cache=cache, preset=preset, depths=depths))
        except UserError as error:
            if number == 0:
                raise
            say(f"left out: {error}")
    return sorted(found, key=rank), len(roomy)


def rank(plan: Prediction) -> tuple:
    """Sorts the best first."""
    return plan.memory.fits is False, -(plan.tokens_per_second or 0.0), plan.memory.peak


def candidates(config: Config, arch: LlavaArchitecture, devices: int) -> Iterator[Config]:
    """Yields every mesh that divides the model, with every cut of the batch into pieces and every remat policy.

    The batch stays as it is, and so does the update: what is varied is how many of its rows a device takes at a time.
    """
    heads = (arch.decoder.heads, arch.decoder.kv_heads, arch.vision.heads)
    experts = config.adapter.experts if config.adapter.kind == "mole" else 1
    for fsdp, expert, tensor in itertools.product(divisors(devices), divisors(experts), divisors(devices)):
        inner = fsdp * expert * tensor
        if (
            devices % inner
            or arch.decoder.width % fsdp
            or any(count % tensor for count in heads)
            or tensor > MOST_TENSOR
        ):
            continue
        mesh = MeshConfig(data=-1, fsdp=fsdp, expert=expert, tensor=tensor, slices=config.mesh.slices)
        for rows, remat in itertools.product(ROWS_PER_DEVICE, typing.get_args(Remat)):
            at_once = rows * devices // tensor
            if config.train.batch_rows % at_once == 0:
                train = dataclasses.replace(config.train, accumulation=config.train.batch_rows // at_once)
                model = dataclasses.replace(config.model, remat=remat)
                yield dataclasses.replace(config, mesh=mesh, train=train, model=model)


def estimate(
    config: Config, arch: LlavaArchitecture, devices: int, chip: Chip | None, work: Work
) -> tuple[float, float]:
    """Returns roughly the seconds per token and the bytes of a device, only to choose what is worth compiling.

    Half the peak for the products, nothing hidden behind them; weights gathered twice for each piece of the batch; over
    tensor two sums of activations a layer in every pass. Memory: weights, adapters with moments, what is kept and a
    fifth more, and 3 GiB to work with; both constants are fitted to compiled plans of a 7B.
    """
    decoder, mesh, adapter = arch.decoder, config.mesh, config.adapter
    layer = decoder.width * (2 * (decoder.heads + decoder.kv_heads) * decoder.head_dim + 3 * decoder.mlp_width)
    numbers = layer * decoder.layers + 2 * decoder.vocab * decoder.width
    pieces = config.train.accumulation
    tokens = config.train.batch_rows * config.data.sequence_length
    here = tokens * mesh.tensor / devices
    flops, links = (chip.flops, chip.links or 1e11) if chip else (1e14, 1e11)
    compute = work.flops * here / mesh.tensor / (flops / 2)
    passes = work.flops / (2 * numbers)
    sent = 2 * 2 * pieces * numbers / mesh.tensor * (1 - 1 / mesh.fsdp)
    sent += 2 * passes * decoder.layers * here * decoder.width * 2 * (1 - 1 / mesh.tensor)
    kept = work.kept_on(arch, mesh.tensor) * here / pieces
    ranks = adapter.rank * (adapter.experts if adapter.kind == "mole" else 1)
    trained = decoder.layers * ranks * 3 * (decoder.width + decoder.mlp_width)
    held = (2 * numbers + 16 * trained) / (mesh.fsdp * mesh.tensor)
    return (compute + sent / links) / tokens, held + 1.2 * kept + 3 * 2**30


def fits(memory: float, chip: Chip | None) -> bool:
    """Tells whether an estimated memory is within the chip's."""
    return chip is None or chip.memory is None or memory <= chip.memory


def inner_size(mesh: MeshConfig) -> int:
    return mesh.fsdp * mesh.expert * mesh.tensor


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
