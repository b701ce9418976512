"""From what the compiler said to what a user wants to know: does it fit, how fast is it, what talks to what."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mole_jax.config import Config
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parallel.devices import Chip, chip_of
from mole_jax.planning.compile import (
    Facts,
    Step,
    abstract_step,
    architecture_of,
    compile_step,
    device_bytes,
    topology_mesh,
    with_layers,
)
from mole_jax.planning.cost import Kernels
from mole_jax.training.flops import recomputed_flops, step_flops

KERNEL_SHARE = 0.7
"""Share of the chip's peak at which a kernel that the compiler does not estimate is taken to do its declared FLOPs.

An assumption, until a chip says otherwise: fused attention is published at 50 to 73 % of an A100's peak
(FlashAttention-2, arXiv 2307.08691) and at up to 75 % of an H100's (FlashAttention-3, arXiv 2407.08608).
"""

DEPTHS = (2, 4)
"""Layers of the two compiles from which the whole depth follows. Not 1: XLA unrolls a loop of one trip."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    trainable: int
    """Trainable parameters, float32."""
    frozen: int
    optimizer: int
    batch: int
    activations: int
    """What forward loops keep for the backward pass."""
    other_temporary: int
    """Gradients, gathered weights, and what an operation works on."""
    code: int
    available: int | None
    """What a program may use of the chip's memory; None where that is not known."""

    @property
    def temporary(self) -> int:
        return self.activations + self.other_temporary

    @property
    def peak(self) -> int:
        return self.trainable + self.frozen + self.optimizer + self.batch + self.temporary + self.code

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.peak <= self.available


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind over the same mesh axes, of one step."""

    kind: str
    axes: tuple[str, ...]
    count: int
    payload: int
    """Bytes of the arrays they work on, as one device sees them whole."""
    sent: int
    """Bytes that a device sends."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One training step on a topology. Everything is predicted; nothing has run."""

    topology: str
    device_kind: str
    devices: int
    mesh: dict[str, int]
    rows: int
    length: int
    remat: str
    accumulation: int
    compiled_layers: tuple[int, ...]
    """One number: compiled whole. Two: extrapolated from these depths to `layers`."""
    layers: int
    memory: Memory
    flops: float
    """FLOPs of a step on one device, without recomputation; the honest count of `training.flops`."""
    hardware_flops: float
    """The same with what the backward pass recomputes."""
    traffic: int
    """Bytes to and from the device's memory."""
    exchanges: tuple[Exchange, ...]
    cycles: int | None
    kernels: Kernels
    """What the cycles leave out."""
    kernel_seconds: float | None
    """What these are taken to need; see `kernel_time`."""
    step_seconds: float | None
    """The compiler's estimated cycles over the clock and `kernel_seconds`; collectives hidden behind them."""
    network_seconds: float | None
    """Least time that the exchanged bytes need with all links of a chip busy; does not add up if it is hidden."""
    tokens_per_second: float | None
    """Over all devices, of the longer of the two times."""
    mfu: float | None
    hfu: float | None
    compile_seconds: float

    @property
    def seconds(self) -> float | None:
        """Predicted time of a step: the longer of compute and network."""
        return None if self.step_seconds is None else max(self.step_seconds, self.network_seconds or 0.0)


def predict(
    config: Config,
    topology: str,
    *,
    cache: Path,
    preset: str | None = None,
    depths: Sequence[int] | None = DEPTHS,
) -> Prediction:
    """Compiles the training step for a topology and says what it takes.

    Args:
        config: the run.
        topology: such as ``v5e:4x4`` or ``h200:8``.
        cache: folder of what was compiled before.
        preset: architecture of a base that is not here.
        depths: numbers of layers to compile, two of them, from which the config's follows by a straight line. None:
            compile all layers.

    Raises:
        UserError: topology, mesh, batch and model do not fit each other, or a compiler is not installed.
    """
    arch = architecture_of(config, preset)
    mesh = topology_mesh(config, topology)
    step = abstract_step(config, arch, mesh)
    layers = arch.decoder.layers
    if depths is None or layers <= max(depths):
        depths = (layers,)
    compiled = [compile_step(config, with_layers(arch, depth), mesh, topology, cache) for depth in depths]
    facts = compiled[0] if len(compiled) == 1 else at_depth(compiled[0], compiled[1], layers)
    seconds = sum(one.seconds for one in compiled)
    return conclude(config, arch, topology, step, facts, depths=tuple(depths), compile_seconds=seconds)


def at_depth(low: Facts, high: Facts, layers: int) -> Facts:
    """Draws the straight line through two depths; a depth that does not fit the device says only what it needs."""
    span = high.layers - low.layers

    def line(a: float, b: float) -> int:
        return max(0, round(a + (b - a) * (layers - low.layers) / span))

    if low.needed is not None or high.needed is not None:
        needed = high.needed or low.needed
        return dataclasses.replace(high, layers=layers, needed=needed)
    kinds = {(one.kind, one.axes) for one in low.collectives + high.collectives}
    collectives = []
    for kind, axes in sorted(kinds):
        a, b = (exchange_of(facts, kind, axes) for facts in (low, high))
        if count := line(a.count, b.count):
            payload, sent = line(a.payload, b.payload), line(a.sent, b.sent)
            template = next(one for one in high.collectives + low.collectives if (one.kind, one.axes) == (kind, axes))
            collectives.append(dataclasses.replace(template, payload=payload // count, sent=sent / count, count=count))
    cycles = None if low.cycles is None or high.cycles is None else line(low.cycles, high.cycles)
    return Facts(
        layers=layers,
        temporary=line(low.temporary, high.temporary),
        code=line(low.code, high.code),
        needed=None,
        cycles=cycles,
        traffic=line(low.traffic, high.traffic),
        kept=line(low.kept, high.kept),
        kernels=Kernels(*map(line, dataclasses.astuple(low.kernels), dataclasses.astuple(high.kernels))),
        collectives=tuple(collectives),
        seconds=low.seconds + high.seconds,
    )


def exchange_of(facts: Facts, kind: str, axes: tuple[str, ...]) -> Exchange:
    """Sums up the collectives of one kind over the same axes."""
    same = [one for one in facts.collectives if (one.kind, one.axes) == (kind, axes)]
    return Exchange(
        kind,
        axes,
        count=sum(one.count for one in same),
        payload=sum(one.count * one.payload for one in same),
        sent=round(sum(one.count * one.sent for one in same)),
    )


def conclude(
    config: Config,
    arch: LlavaArchitecture,
    topology: str,
    step: Step,
    facts: Facts,
    *,
    depths: tuple[int, ...],
    compile_seconds: float,
) -> Prediction:
    """Puts the compiler's word, the shapes and the chip's data sheet together."""
    device = step.mesh.devices.flat[0]
    chip = chip_of(device)
    memory = memory_of(step, facts, chip)
    flops = step_flops(config, arch, step.spec.declarations, config.train.trainable) / step.mesh.size
    again = recomputed_flops(config, arch, step.spec.declarations) / step.mesh.size
    kinds = sorted({(one.kind, one.axes) for one in facts.collectives})
    exchanges = sorted((exchange_of(facts, *kind) for kind in kinds), key=lambda one: -one.sent)
    compute = kernels = None
    if facts.cycles and chip and chip.clock:
        kernels = kernel_time(facts.kernels, chip)
        compute = facts.cycles / chip.clock + kernels
    network = sum(one.sent for one in exchanges) / chip.links if chip and chip.links else None
    seconds = None if compute is None else max(compute, network or 0.0)
    return Prediction(
        topology=topology,
        device_kind=device.device_kind,
        devices=step.mesh.size,
        mesh={axis: int(size) for axis, size in step.mesh.shape.items()},
        rows=config.train.batch_rows,
        length=config.data.sequence_length,
        remat=config.model.remat,
        accumulation=config.train.accumulation,
        compiled_layers=depths,
        layers=arch.decoder.layers,
        memory=memory,
        flops=flops,
        hardware_flops=flops + again,
        traffic=facts.traffic,
        exchanges=tuple(exchanges),
        cycles=facts.cycles,
        kernels=facts.kernels,
        kernel_seconds=kernels,
        step_seconds=compute,
        network_seconds=network,
        tokens_per_second=config.train.batch_rows * config.data.sequence_length / seconds if seconds else None,
        mfu=flops / seconds / chip.flops if seconds and chip else None,
        hfu=(flops + again) / seconds / chip.flops if seconds and chip else None,
        compile_seconds=compile_seconds,
    )


def kernel_time(kernels: Kernels, chip: Chip) -> float:
    """Returns the time that kernels without an estimate are taken to need.

    Those that declare what they do: their FLOPs at `KERNEL_SHARE` of the chip's peak, or their bytes at its bandwidth
    if that is longer. The others: their bytes.
    """
    bandwidth = chip.bandwidth or math.inf
    declared = max(kernels.flops / (KERNEL_SHARE * chip.flops), kernels.traffic / bandwidth)
    return declared + kernels.undeclared / bandwidth


def memory_of(step: Step, facts: Facts, chip: Chip | None) -> Memory:
    """Divides the bytes of a device; what a program that does not fit needs beyond its arguments counts as other."""
    arguments = {
        "trainable": device_bytes(step.state.params),
        "frozen": device_bytes(step.frozen),
        "optimizer": device_bytes(step.state.opt_state),
        "batch": device_bytes(step.batch),
    }
    rest = facts.temporary if facts.needed is None else max(0, facts.needed - sum(arguments.values()))
    kept = min(facts.kept, rest)
    available = math.floor(chip.memory) if chip and chip.memory else None
    return Memory(**arguments, activations=kept, other_temporary=rest - kept, code=facts.code, available=available)


def as_json(value: Any) -> Any:
    """Returns a prediction as one JSON object, with what follows from its fields."""
    plain = dataclasses.asdict(value)
    plain["memory"] |= {name: getattr(value.memory, name) for name in ("temporary", "peak", "fits")}
    return plain | {"seconds": value.seconds}
