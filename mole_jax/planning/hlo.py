"""A compiled program's text (HLO) as computations and instructions; `mole_jax.planning.cost` adds them up.

The format is XLA's; of it only instructions, shapes, loop conditions and what attributes call are read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')

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


class HloModule:
    """A compiled program's computations, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        body: dict[str, Instruction] | None = None
        for line in whole_lines(text):
            if body is None:
                if opened := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                    body = self.computations[opened[2]] = {}
                    self.entry = opened[2] if opened[1] else self.entry
            elif line.startswith("}"):
                body = None
            elif instruction := parse_instruction(line):
                body[instruction.name] = instruction

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


def whole_lines(text: str) -> Iterator[str]:
    """Yields a program's lines; one that leaves braces open, as a Pallas kernel's metadata does, goes on in the next.

    The brace that opens a computation, or the module's header, ends its line and does not count.
    """
    begun, depth = "", 0
    for line in text.splitlines():
        border = not depth and (line.endswith(" {") or line.startswith("}"))
        if not border and line.count("{") != line.count("}"):
            bare = _QUOTED.sub("", line)
            depth += bare.count("{") - bare.count("}")
        begun += line
        if depth <= 0:
            yield begun
            begun, depth = "", 0


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
    return Instruction(
        name=head[2],
        opcode=opcode,
        shapes=parse_shapes(shape),
        operands=operands,
        attributes=attributes,
        is_root=head[1] is not None,
    )


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
