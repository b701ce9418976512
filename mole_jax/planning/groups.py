"""From the device groups of a collective, as XLA writes them, to the mesh axes that it reaches over."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np


def axes_of(attributes: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes that a collective's groups reach over and the size of a group."""
    count = math.prod(mesh_shape.values())
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes)
    if pairs is not None:
        places = np.array([np.unravel_index(i, tuple(mesh_shape.values())) for i in range(count)])
        moved = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[0])]
        changed = (
            np.any([places[a] != places[b] for a, b in moved], axis=0) if moved else np.zeros(len(mesh_shape), bool)
        )
        axes = tuple(axis for axis, moves in zip(mesh_shape, changed, strict=True) if moves)
        return axes, 2 if axes else 1
    groups = replica_groups(attributes, count)
    if groups is None:
        return ("?",), count
    ids = np.arange(count).reshape(tuple(mesh_shape.values()))
    names = [axis for axis, size in mesh_shape.items() if size > 1]
    for chosen in range(2 ** len(names)):
        axes = tuple(axis for bit, axis in enumerate(names) if chosen >> bit & 1)
        places = [list(mesh_shape).index(axis) for axis in axes]
        rest = [i for i in range(len(mesh_shape)) if i not in places]
        size = math.prod(mesh_shape[axis] for axis in axes)
        if {frozenset(group) for group in ids.transpose(*rest, *places).reshape(-1, size).tolist()} == groups:
            return axes, size
    return ("?",), max(map(len, groups))


def replica_groups(attributes: str, count: int) -> set[frozenset[int]] | None:
    """Reads the groups of a collective in any of XLA's four notations; None if there are none to read."""
    if mesh := re.search(r"replica_groups=@?mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return _groups_over(shape, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        ids = np.arange(count).reshape([int(size) for size in iota[3].split(",")])
        if iota[4]:
            ids = ids.transpose([int(axis) for axis in iota[4].split(",")])
        return {frozenset(group) for group in ids.reshape(int(iota[1]), int(iota[2])).tolist()}
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = {frozenset(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])}
        return groups or {frozenset(range(count))}
    return None


def _groups_over(shape: dict[str, int], axes: list[tuple[str, str, str]]) -> set[frozenset[int]]:
    """Groups over whole axes ('a') or parts of them ('a':(before)size) of a mesh whose ids count up."""
    dims: list[tuple[str, int, int]] = []
    for name, size in shape.items():
        cuts = sorted(
            {1, size}
            | {b for n, before, part in axes if n == name and before for b in (int(before), int(before) * int(part))}
        )
        dims += [(name, low, high // low) for low, high in itertools.pairwise(cuts)]
    inside = [
        i
        for i, (name, low, part) in enumerate(dims)
        if any(n == name and (not before or int(before) <= low < int(before) * int(size)) for n, before, size in axes)
    ]
    outside = [i for i in range(len(dims)) if i not in inside]
    ids = np.arange(math.prod(shape.values())).reshape([part for _, _, part in dims])
    size = math.prod(dims[i][2] for i in inside)
    return {frozenset(group) for group in ids.transpose(*outside, *inside).reshape(-1, size).tolist()}
