"""How the names of foreign tensors are written down: tables of rows, and what follows from one row.

Our parameters are a nested dict of arrays; a leaf's path joins its keys with "/". Layers are stacked on a
leading axis, kernels are (in, out). Hugging Face keeps one tensor a layer and kernels as (out, in).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mole_jax.model.architecture import LlavaArchitecture

# How our axes are taken from the foreign tensor's: ours.shape[i] = foreign.shape[permutation[i]].
TRANSPOSE = (1, 0)  # (out, in) -> (in, out)
CONV = (2, 3, 1, 0)  # (Dv, 3, P, P) -> (P, P, 3, Dv)


class Row(NamedTuple):
    """One array of ours and its foreign name.

    Axis letters: Dv, Fv width and MLP width of the vision tower; P patch side in pixels, T its tokens; I width of what
    enters the connector; D, F, V of the decoder; HC and KC heads and key/value heads times head width, C head width.
    """

    path: str
    axes: str
    """Of one layer."""
    name: str
    """With ``{layer}`` where layers are stacked."""
    permutation: tuple[int, ...] | None = None
    """None: as it is."""
    ones: int = 0
    """Axes of length 1 in front of the foreign tensor."""


def affine(path: str, axis: str, name: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Returns the rows of a norm."""
    rows = Row(path + "/scale", axis, name + ".weight"), Row(path + "/bias", axis, name + ".bias")
    return rows if bias else rows[:1]


def linear(path: str, axes: str, name: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Returns the rows of a matrix and its bias."""
    kernel = Row(path + "/kernel", axes, name + ".weight", TRANSPOSE)
    return (kernel, Row(path + "/bias", axes.split()[1], name + ".bias")) if bias else (kernel,)


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """One leaf of our parameters and the foreign tensors that it is made of."""

    path: str
    """Our path, keys joined by "/"."""
    shape: tuple[int, ...]
    """Our shape, with the layer axis in front where `stacked`."""
    pattern: str
    """Canonical foreign name, with ``{layer}`` where `stacked`."""
    permutation: tuple[int, ...]
    """Axis of the foreign tensor, without its `ones`, for each of our axes of one layer."""
    ones: int = 0
    """Axes of length 1 in front of the foreign tensor."""

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.pattern

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical foreign names, by layer; a single one where the leaf is not stacked."""
        if not self.stacked:
            return (self.pattern,)
        return tuple(self.pattern.format(layer=layer) for layer in range(self.shape[0]))

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """Shape of each foreign tensor."""
        ours = self.shape[1:] if self.stacked else self.shape
        foreign = [0] * len(ours)
        for axis, source in enumerate(self.permutation):
            foreign[source] = ours[axis]
        return (1,) * self.ones + tuple(foreign)

    @property
    def inverse(self) -> tuple[int, ...]:
        """Permutation that takes one layer of ours back to the foreign axes."""
        return tuple(self.permutation.index(axis) for axis in range(len(self.permutation)))

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a foreign tensor with our axes."""
        return tensor.reshape(tensor.shape[self.ones :]).transpose(self.permutation)

    def theirs(self, layer: np.ndarray) -> np.ndarray:
        """Returns one layer of ours with the foreign axes."""
        return layer.transpose(self.inverse).reshape(self.foreign_shape)


def leaf_specs(rows: Iterable[Row], arch: LlavaArchitecture) -> dict[str, LeafSpec]:
    """Returns the leaves of a table by path, in its order, which is that of written files."""
    vision, decoder = arch.vision, arch.decoder
    sizes = {
        "3": 3,
        "P": vision.patch_size,
        "T": vision.tokens,
        "Dv": vision.width,
        "Fv": vision.mlp_width,
        "I": vision.width * arch.connector.shuffle**2,
        "D": decoder.width,
        "F": decoder.mlp_width,
        "V": decoder.vocab,
        "C": decoder.head_dim,
        "HC": decoder.heads * decoder.head_dim,
        "KC": decoder.kv_heads * decoder.head_dim,
    }
    specs = {}
    for row in rows:
        shape = tuple(sizes[axis] for axis in row.axes.split())
        permutation = row.permutation or tuple(range(len(shape)))
        if "{layer}" in row.name:
            shape = (vision.layers if row.path.startswith("vision/") else decoder.layers, *shape)
        specs[row.path] = LeafSpec(row.path, shape, row.name, permutation, row.ones)
    return specs
