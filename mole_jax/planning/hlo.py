"""What a compiled program says about itself: its text (HLO) read for collectives, loops, cycles and memory traffic.

`cost_analysis()` counts the body of a loop once and says nothing of collectives; the text has both. The format is
XLA's; of it only instructions, shapes, loop conditions and replica groups are read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from mole_jax.planning.groups import axes_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "partition-id", "after-all")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: bytes of its numbers, without padding."""

    dims: tuple[int, ...]
    bytes: int
    near: bool
    """It is kept in memory beside the compute units (memory space 1), not in the device's main memory."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of the result; several if it is a tuple."""
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def called(self, *attributes: str) -> list[str]:
        """Returns the computations named by these attributes, such as ``body`` or ``calls``."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(?:%?([\w.\-]+)|{{([^}}]*)}})", self.attributes)
        return [name.strip().lstrip("%") for one, many in found for name in (one or many).split(",")]

    @property
    def cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0


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
    """As a kernel declares them; 0 for a gather."""
    traffic: int = 0
    """Bytes: as a kernel declares them, else of operands and result."""


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


class Program:
    """A compiled program's computations, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        body: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if body is None:
                if opened := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                    body = self.computations[opened[2]] = {}
                    self.entry = opened[2] if opened[1] else self.entry
            elif line.startswith("}"):
                body = None
            elif instruction := parse_instruction(line):
                body[instruction.name] = instruction

    def cost(self, mesh_shape: Mapping[str, int]) -> Cost:
        """Adds up the program. `mesh_shape` is that of the mesh whose devices, in order, are the program's partitions.

        Of a conditional the branch of most cycles (of most traffic, where no cycles are known) counts.
        """
        sums = _Sums(self, mesh_shape)
        sums.run(self.entry, 1)
        collectives = tuple(
            dataclasses.replace(one, count=count)
            for one, count in sorted(sums.collectives.items(), key=lambda item: -item[0].sent * item[1])
        )
        kernels = Kernels(*sums.kernels) if sums.cycles else Kernels()
        return Cost(collectives, sums.cycles or None, sums.traffic, sums.kept, kernels)

    def trips(self, loop: Instruction) -> int:
        """Returns how often a loop's body runs: as XLA noted, else from its condition, counter < constant."""
        if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        condition = self.computations[loop.called("condition")[0]]
        bounds = [
            int(found[1])
            for one in self._with_called(condition)
            if one.opcode == "constant" and not any(shape.dims for shape in one.shapes)
            if (found := re.match(r"(\d+)\)", one.attributes))
        ]
        if len(bounds) != 1:
            raise ValueError(f"loop {loop.name}: its condition has {len(bounds)} bounds, so its count is not known")
        return bounds[0]

    def _with_called(self, computation: Mapping[str, Instruction]) -> Iterator[Instruction]:
        for one in computation.values():
            yield one
            for name in one.called("calls", "to_apply"):
                yield from self._with_called(self.computations.get(name, {}))

    def stacked(self, loop: Instruction, trips: int) -> int:
        """Returns the bytes of the arrays that a loop fills a slice at a time, one slice a trip."""
        body = self.computations[loop.called("body")[0]]
        root = next(one for one in body.values() if one.is_root)
        pairs = zip(root.operands, loop.shapes, strict=False)
        return sum(s.bytes for name, s in pairs if s.dims[:1] == (trips,) and self._filled(body, name, s))

    def _filled(self, body: Mapping[str, Instruction], name: str, shape: Shape) -> bool:
        """Tells whether a value is an array of this size with a slice of it written anew."""
        one = body.get(name)
        while one is not None and one.opcode in ("bitcast", "copy", "copy-start", "copy-done", "get-tuple-element"):
            one = body.get(one.operands[0])
        if one is None:
            return False
        inner = self._with_called({name: one})
        return any(i.opcode == "dynamic-update-slice" and i.shapes[0].bytes == shape.bytes for i in inner)


class _Sums:
    def __init__(self, program: Program, mesh_shape: Mapping[str, int]):
        self.program, self.mesh_shape = program, mesh_shape
        self.cycles = self.traffic = self.kept = 0
        self.kernels = [0, 0, 0]
        self.collectives: dict[Collective, int] = {}

    def run(self, name: str, times: int) -> None:
        computation = self.program.computations[name]
        seen: set[str] = set()
        for one in computation.values():
            if one.opcode == "while":
                trips = self.program.trips(one)
                # The scan over layers of the differentiated function; its transpose only reads what this one stacked.
                if "jvp(" in one.attributes and "transpose(" not in one.attributes:
                    self.kept += times * self.program.stacked(one, trips)
                self.run(one.called("body")[0], times * trips)
            elif one.opcode == "conditional":
                branches = one.called("branch_computations", "true_computation", "false_computation")
                self.add(max((self.alone(branch) for branch in branches), key=lambda s: (s.cycles, s.traffic)), times)
            elif one.opcode == "call":
                self.run(one.called("to_apply", "calls")[0], times)
            else:
                self.cycles += times * one.cycles
                moved = traffic(self.program, computation, one)
                self.traffic += times * moved
                exchanges = list(self.found(one, one.opcode, one))
                if not exchanges and is_kernel(one):
                    declared = re.search(r'"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', one.attributes)
                    flops, size = (int(declared[1]), int(declared[2])) if declared else (0, moved)
                    self.add_kernels([1, flops, size], times)
                for kind, group, what in exchanges:
                    # One collective overlapped with several fusions stands in each of them under one channel.
                    channel = re.search(r"channel_id=(\d+)", what.attributes)
                    if channel is None or channel[1] not in seen:
                        self.count(kind, group, what, times)
                    seen.add(channel[1] if channel else "")

    def alone(self, branch: str) -> _Sums:
        sums = _Sums(self.program, self.mesh_shape)
        sums.run(branch, 1)
        return sums

    def add(self, other: _Sums, times: int) -> None:
        self.cycles += times * other.cycles
        self.traffic += times * other.traffic
        self.kept += times * other.kept
        self.add_kernels(other.kernels, times)
        for one, count in other.collectives.items():
            self.collectives[one] = self.collectives.get(one, 0) + times * count

    def add_kernels(self, more: list[int], times: int) -> None:
        self.kernels = [a + times * b for a, b in zip(self.kernels, more, strict=True)]

    def found(self, one: Instruction, opcode: str, outer: Instruction) -> Iterator[tuple[str, str, Instruction]]:
        """Yields (kind, attributes with the groups, instruction) of the collectives in `one` and what it calls."""
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # XLA:TPU writes a reduce-scatter as a fusion, named so, of an all-reduce and a slice.
            scatters = kind == "all-reduce" and any(
                name.startswith("all-reduce-scatter") for name in outer.called("calls")
            )
            yield "reduce-scatter" if scatters else kind, one.attributes, one
        elif not opcode.endswith(("-done", "-update")):
            for name in one.called("calls"):
                for inner in self.program.computations.get(name, {}).values():
                    yield from self.found(inner, inner.opcode, one)

    def count(self, kind: str, attributes: str, one: Instruction, times: int) -> None:
        axes, n = axes_of(attributes, self.mesh_shape)
        if n == 1:
            return
        started = one.opcode.endswith("-start")
        size = one.bytes
        if kind == "all-gather" and started:  # its result is (operand, gathered)
            size = size * n // (n + 1)
        elif kind == "collective-permute" and started:  # (operand, result)
            size //= 2
        elif kind == "reduce-scatter" and one.opcode != "all-reduce":
            size = size * n // (n + 1) if started else size * n
        ring = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        key = Collective(kind, axes, size, size * ring, 0)
        self.collectives[key] = self.collectives.get(key, 0) + times


def is_kernel(one: Instruction) -> bool:
    """Tells whether an operation is a kernel of which the TPU's compiler estimates no cycles."""
    called = one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.attributes
    return (called or (one.opcode == "fusion" and "kind=kCustom" in one.attributes)) and one.cycles == 0


def parse_instruction(line: str) -> Instruction | None:
    """Reads one line of a computation; None for one that is no instruction."""
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    shape, rest = _until_opcode(line[head.end() :])
    opcode, _, rest = rest.partition("(")
    operands, attributes = _split_operands(rest)
    if opcode in ("constant", "parameter"):  # what stands in their brackets is a value, or the number
        operands, attributes = (), rest
    return Instruction(head[2], opcode, parse_shapes(shape), operands, attributes, head[1] is not None)


def _until_opcode(text: str) -> tuple[str, str]:
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _split_operands(text: str) -> tuple[tuple[str, ...], str]:
    depth = 1
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return tuple(re.findall(r"%([\w.\-]+)", text[:i])), text[i + 1 :]
    return (), text


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a shape such as ``f32[8,128]{1,0}`` or a tuple of such."""
    found = []
    for kind, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        bits = BITS.get(kind) or int((re.search(r"\d+", kind) or ["0"])[0])
        found.append(Shape(sizes, math.prod(sizes) * bits // 8, "S(1)" in layout))
    return tuple(found)


def traffic(program: Program, computation: Mapping[str, Instruction], one: Instruction) -> int:
    """Returns the bytes that one operation reads and writes in main memory; of an array it only slices, the slice."""
    if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
        return 0
    inner = program.computations.get((one.called("calls") or [""])[0], {}) if one.opcode == "fusion" else {}
    inputs = {int(p.attributes.split(")")[0] or 0): p for p in inner.values() if p.opcode == "parameter"}
    total = 0
    for number, name in enumerate(one.operands):
        operand = computation.get(name)
        if operand is None or any(shape.near for shape in operand.shapes):
            continue
        users = [user for user in inner.values() if number in inputs and inputs[number].name in user.operands]
        if one.opcode in ("dynamic-slice", "gather") and number == 0:
            total += one.bytes
        elif one.opcode == "dynamic-update-slice" and number == 0:
            continue
        elif users and all(user.opcode in ("dynamic-slice", "gather", "dynamic-update-slice") for user in users):
            total += sum(user.bytes for user in users if user.opcode != "dynamic-update-slice")
        else:
            total += operand.bytes
    written = [one]
    for update in inner.values() if inner else [one]:
        if update.opcode == "dynamic-update-slice":
            source = inner if inner else computation
            return total + (source[update.operands[1]].bytes if update.operands[1] in source else 0)
    return total + sum(shape.bytes for shape in written[0].shapes if not shape.near)
