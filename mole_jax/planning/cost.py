"""What a step costs one device, by the text of its compiled program: collectives, cycles, memory traffic, activations.

`cost_analysis()` counts the body of a loop once and says nothing of collectives; the text has both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from mole_jax.planning.groups import axes_of
from mole_jax.planning.hlo import HloModule, Instruction

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "partition-id", "after-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation, as often as a step runs it."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes that it reaches over; ("?",) where its groups are none of the mesh."""
    payload: int
    """Bytes of the whole array on a device: gathered, to be reduced, or exchanged."""
    sent: float
    """Bytes that a device sends in a ring: (n-1)/n of the payload for n devices, twice that for an all-reduce."""
    count: int
    """Times a step."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernels that the compiler calls without estimating them (Pallas, `ragged_dot`, gathers), over a step."""

    count: int = 0
    flops: int = 0
    """As the kernels declare them."""
    traffic: int = 0
    """Bytes, as the kernels declare them."""
    undeclared: int = 0
    """Bytes that kernels which declare nothing (gathers, scatters) read and write."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step costs one device by the text of its program, every loop's body taken as often as it runs."""

    collectives: tuple[Collective, ...]
    cycles: int | None
    """The compiler's estimate, summed; None where the platform's compiler gives none."""
    traffic: int
    """Bytes read and written by the operations that run one after the other, main memory only."""
    kept: int
    """Bytes that forward loops stack up for the backward pass: the activations."""
    kernels: Kernels
    """What `cycles` leaves out."""


def cost_of(module: HloModule, mesh_shape: Mapping[str, int]) -> Cost:
    """Adds up a program. `mesh_shape` is that of the mesh whose devices, in order, are the program's partitions.

    Of a conditional the branch of most cycles (of most traffic, where no cycles are known) counts.
    """
    sums = _Sums(module, mesh_shape)
    sums.run(module.entry, 1)
    collectives = tuple(
        dataclasses.replace(one, count=count)
        for one, count in sorted(sums.collectives.items(), key=lambda item: -item[0].sent * item[1])
    )
    kernels = Kernels(*sums.kernels) if sums.cycles else Kernels()
    return Cost(collectives, sums.cycles or None, sums.traffic, sums.kept, kernels)


class _Sums:
    """The costs of what has run so far."""

    def __init__(self, module: HloModule, mesh_shape: Mapping[str, int]):
        self.module, self.mesh_shape = module, mesh_shape
        self.cycles = self.traffic = self.kept = 0
        self.kernels = [0, 0, 0, 0]
        self.collectives: dict[Collective, int] = {}

    def run(self, name: str, times: int) -> None:
        """Adds a computation that runs so many times."""
        computation = self.module.computations[name]
        seen: set[str] = set()
        for one in computation.values():
            if one.opcode == "while":
                self.loop(one, times)
            elif one.opcode == "conditional":
                branches = one.called("branch_computations", "true_computation", "false_computation")
                self.add(max(map(self.alone, branches), key=lambda sums: (sums.cycles, sums.traffic)), times)
            elif one.opcode == "call":
                self.run(one.called("to_apply", "calls")[0], times)
            else:
                self.operation(one, computation, seen, times)

    def loop(self, one: Instruction, times: int) -> None:
        trips = self.module.trips(one)
        # The scan over layers of the differentiated function; its transpose only reads what this one stacked.
        if "jvp(" in one.attributes and "transpose(" not in one.attributes:
            # Another piece of the batch takes the same memory again.
            self.kept += self.module.stacked(one, trips)
        self.run(one.called("body")[0], times * trips)

    def operation(self, one: Instruction, computation: Mapping[str, Instruction], seen: set[str], times: int) -> None:
        """Adds one operation of a computation; `seen` are the collectives counted there."""
        self.cycles += times * one.cycles
        moved = traffic(self.module, computation, one)
        self.traffic += times * moved
        exchanges = list(self.found(one, one.opcode, one))
        if not exchanges and is_kernel(one):
            declared = re.search(r'"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', one.attributes)
            costs = [int(declared[1]), int(declared[2]), 0] if declared else [0, 0, moved]
            self.add_kernels([1, *costs], times)
        for kind, what in exchanges:
            # One collective overlapped with several fusions stands in each of them under one channel. Those that stand
            # alone are each another one, and may all have the same channel.
            channel = re.search(r"channel_id=(\d+)", what.attributes)
            key = channel[1] if channel and what is not one else what.name
            if key not in seen:
                self.count(kind, what, times)
            seen.add(key)

    def alone(self, branch: str) -> _Sums:
        sums = _Sums(self.module, self.mesh_shape)
        sums.run(branch, 1)
        return sums

    def add(self, other: _Sums, times: int) -> None:
        self.cycles += times * other.cycles
        self.traffic += times * other.traffic
        self.kept += other.kept
        self.add_kernels(other.kernels, times)
        for one, count in other.collectives.items():
            self.collectives[one] = self.collectives.get(one, 0) + times * count

    def add_kernels(self, more: list[int], times: int) -> None:
        self.kernels = [a + times * b for a, b in zip(self.kernels, more, strict=True)]

    def found(self, one: Instruction, opcode: str, outer: Instruction) -> Iterator[tuple[str, Instruction]]:
        """Yields kind and instruction of the collectives in `one` and what it calls."""
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # XLA:TPU writes a reduce-scatter as a fusion, named so, of an all-reduce and a slice.
            scatters = kind == "all-reduce" and any(
                name.startswith("all-reduce-scatter") for name in outer.called("calls")
            )
            yield "reduce-scatter" if scatters else kind, one
        elif not opcode.endswith(("-done", "-update")):
            for name in one.called("calls"):
                for inner in self.module.computations.get(name, {}).values():
                    yield from self.found(inner, inner.opcode, one)

    def count(self, kind: str, one: Instruction, times: int) -> None:
        axes, n = axes_of(one.attributes, self.mesh_shape)
        if n == 1:
            return
        size = payload(kind, one, n)
        ring = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        key = Collective(kind, axes, size, size * ring, 0)
        self.collectives[key] = self.collectives.get(key, 0) + times


def payload(kind: str, one: Instruction, devices: int) -> int:
    """Returns the bytes of the whole array that a collective of a group of so many devices is about."""
    started, size = one.opcode.endswith("-start"), one.bytes
    if kind == "all-gather" and started:  # its result is (operand, gathered)
        return size * devices // (devices + 1)
    if kind == "collective-permute" and started:  # (operand, result)
        return size // 2
    if kind == "reduce-scatter" and one.opcode != "all-reduce":
        return size * devices // (devices + 1) if started else size * devices
    return size


def is_kernel(one: Instruction) -> bool:
    """Tells whether an operation is a kernel of which the TPU's compiler estimates no cycles."""
    called = one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.attributes
    return (called or (one.opcode == "fusion" and "kind=kCustom" in one.attributes)) and one.cycles == 0


def traffic(module: HloModule, computation: Mapping[str, Instruction], one: Instruction) -> int:
    """Returns the bytes that one operation reads and writes in main memory.

    Of an array that it only slices that is the slice; of one that it writes into, what it writes.
    """
    if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
        return 0
    return bytes_read(module, computation, one) + bytes_written(module, computation, one)


def _fused(module: HloModule, one: Instruction) -> Mapping[str, Instruction]:
    """Returns the computation of a fusion, empty for anything else."""
    return module.computations.get((one.called("calls") or [""])[0], {}) if one.opcode == "fusion" else {}


def bytes_read(module: HloModule, computation: Mapping[str, Instruction], one: Instruction) -> int:
    """Returns what an operation reads in main memory."""
    total = 0
    for name in dict.fromkeys(one.operands):
        operand = computation.get(name)
        if operand is None or any(shape.near for shape in operand.shapes):
            continue
        part = _part_read(module, computation, one, name)
        # An operand that stands twice is read twice.
        total += one.operands.count(name) * operand.bytes if part is None else min(operand.bytes, part)
    return total


def _part_read(module: HloModule, computation: Mapping[str, Instruction], user: Instruction, name: str) -> int | None:
    """Returns the bytes that an instruction reads of its operand `name`, None if all of it.

    A fusion is looked into, and so are the fusions and bitcasts in it.
    """
    places = [place for place, operand in enumerate(user.operands) if operand == name]
    if inner := _fused(module, user):
        inputs = {int(p.attributes.split(")")[0] or 0): p.name for p in inner.values() if p.opcode == "parameter"}
        return _sum(_part_by_all(module, inner, inputs[place]) for place in places if place in inputs)
    updates = _updates(computation, user)
    if user.opcode in ("dynamic-slice", "gather") and places == [0]:
        return user.bytes
    if all(place < len(updates) for place in places):  # a scatter may add to what is there; a slice is put over it
        return sum(updates[place] for place in places) if user.opcode == "scatter" else 0
    return None


def _part_by_all(module: HloModule, inner: Mapping[str, Instruction], name: str) -> int | None:
    """Returns the bytes that all instructions of a fusion read of what is named so, None if all of it."""
    users = [user for user in inner.values() if name in user.operands]
    return _sum(
        _part_by_all(module, inner, user.name) if user.opcode == "bitcast" else _part_read(module, inner, user, name)
        for user in users
    )


def _sum(parts: Iterable[int | None]) -> int | None:
    found = list(parts)
    return None if None in found else sum(part for part in found if part is not None)


def _updates(computation: Mapping[str, Instruction], one: Instruction) -> list[int]:
    """Returns the bytes that an instruction writes into each of the arrays, its first operands, that it changes."""
    if one.opcode == "dynamic-update-slice":
        updates = one.operands[1:2]
    elif one.opcode == "scatter":  # arrays, indices, as many updates
        updates = one.operands[len(one.operands) // 2 + 1 :]
    else:
        return []
    return [computation[name].bytes for name in updates]


def bytes_written(module: HloModule, computation: Mapping[str, Instruction], one: Instruction) -> int:
    """Returns what an operation writes in main memory; see `bytes_read`."""
    written = _written(module, computation, one)
    alike = len(written) == len(one.shapes)
    return sum(
        (updated if (updated := written[number if alike else 0]) is not None else shape.bytes)
        for number, shape in enumerate(one.shapes)
        if not shape.near
    )


def _written(module: HloModule, computation: Mapping[str, Instruction], one: Instruction) -> list[int | None]:
    """Returns for each result what is written of it, None for all; looks through fusions and bitcasts."""
    while one.opcode == "bitcast" and one.operands[0] in computation:
        one = computation[one.operands[0]]
    if inner := _fused(module, one):
        root = next(each for each in inner.values() if each.is_root)
        outputs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return [_written(module, inner, output)[0] for output in outputs]
    return [(_updates(computation, one) or [None])[0]]
