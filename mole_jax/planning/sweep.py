"""Other meshes, batch sizes and remat policies for the same run: the most promising are compiled, best first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from mole_jax.config import Config, MeshConfig
from mole_jax.errors import UserError
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parallel.devices import Chip, chip_of
from mole_jax.planning.advice import products_bytes
from mole_jax.planning.compile import architecture_of
from mole_jax.planning.predict import DEPTHS, Prediction, predict
from mole_jax.planning.topology import devices_of

ROWS_PER_DEVICE = (1, 2, 4, 8)
REMATS = ("full", "dots", "none")
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
    ranked = sorted(candidates(config, arch, len(devices)), key=lambda one: estimate(one, arch, len(devices), chip)[0])
    roomy = [one for one in ranked if fits(one, arch, len(devices), chip)]
    found = []
    for number, one in enumerate([config, *(one for one in roomy if one != config)][: limit + 1]):
        mesh = dataclasses.replace(one.mesh, data=len(devices) // inner_size(one.mesh))
        say(f"{number + 1} of {min(limit, len(roomy)) + 1}: {mesh}, {one.train.batch_rows} rows, {one.model.remat}")
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
    """Yields every mesh that divides the model with every batch of some rows a device and every remat policy.

    No pieces: what they are for, a smaller batch at a time, is what the rows are varied for.
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
        for rows, remat in itertools.product(ROWS_PER_DEVICE, REMATS):
            train = dataclasses.replace(config.train, batch_rows=rows * devices // tensor, accumulation=1)
            model = dataclasses.replace(config.model, remat=remat)
            yield dataclasses.replace(config, mesh=mesh, train=train, model=model)


def estimate(config: Config, arch: LlavaArchitecture, devices: int, chip: Chip | None) -> tuple[float, float]:
    """Returns roughly the seconds per token and the bytes of a device, only to choose what is worth compiling.

    Half the peak for the products, nothing hidden behind them; weights gathered twice (three times with full
    recomputation); over tensor four sums of activations a layer and pass. Memory: weights, adapters with moments, what
    is kept and a fifth more, and 3 GiB to work with; both constants are fitted to three compiled plans of a 7B.
    """
    decoder, mesh, adapter = arch.decoder, config.mesh, config.adapter
    layer = decoder.width * (2 * (decoder.heads + decoder.kv_heads) * decoder.head_dim + 3 * decoder.mlp_width)
    numbers = layer * decoder.layers + 2 * decoder.vocab * decoder.width
    tokens = config.train.batch_rows * config.data.sequence_length
    here = tokens * mesh.tensor / devices
    passes = {"none": 4, "dots": 4, "full": 6}[config.model.remat]
    flops, links = (chip.flops, chip.links or 1e11) if chip else (1e14, 1e11)
    compute = passes * numbers * here / mesh.tensor / (flops / 2)
    gathers = 3 if config.model.remat == "full" else 2
    sent = gathers * 2 * numbers / mesh.tensor * (1 - 1 / mesh.fsdp)
    sent += gathers * 4 * decoder.layers * here * decoder.width * 2 * (1 - 1 / mesh.tensor)
    attention = 6.0 * decoder.heads / mesh.tensor * config.data.sequence_length * decoder.layers * here
    kept = {
        "full": 2.0 * decoder.width * decoder.layers * here,
        "dots": products_bytes(arch, here, mesh.tensor),
        "none": products_bytes(arch, here, mesh.tensor) + attention,
    }[config.model.remat]
    ranks = adapter.rank * (adapter.experts if adapter.kind == "mole" else 1)
    trained = decoder.layers * ranks * 3 * (decoder.width + decoder.mlp_width)
    held = (2 * numbers + 16 * trained) / (mesh.fsdp * mesh.tensor)
    return (compute + sent / links) / tokens, held + 1.2 * kept + 3 * 2**30


def fits(config: Config, arch: LlavaArchitecture, devices: int, chip: Chip | None) -> bool:
    """Tells whether a candidate's estimated memory is within the chip's."""
    return chip is None or chip.memory is None or estimate(config, arch, devices, chip)[1] <= chip.memory


def inner_size(mesh: MeshConfig) -> int:
    return mesh.fsdp * mesh.expert * mesh.tensor


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
