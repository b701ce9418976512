"""An array of a model that is read when asked for, one layer at a time.

Layers are stacked on the first axis of our arrays (`mole_jax.weights.names`), and a stack of 32 can be larger than a
file of the checkpoint. Whoever takes an array layer by layer takes a `Leaf` as well: both have a shape, are indexed
and iterated over by layer, and become a numpy array by `np.asarray`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

LAYERS = "/layers/"
"""Part of the path of every array whose first axis is the layers."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that stays in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """Type of what is read."""
    stacked: bool
    """The first axis is layers, each read on its own; otherwise the array is read as one."""
    read: Callable[[int], np.ndarray]
    """Returns the value of a layer, or of the whole array (of layer 0) where it is not stacked; in any type."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def part_bytes(self) -> int:
        """Bytes of what is read at a time."""
        return self.size // (self.shape[0] if self.stacked else 1) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, layer: int) -> np.ndarray:
        """Returns a layer of a stacked array."""
        if not self.stacked or not 0 <= layer < len(self):
            raise IndexError(layer)
        return self.read(layer).astype(self.dtype, copy=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[layer] for layer in range(len(self)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        if not self.stacked:
            return self.read(0).astype(dtype, copy=False)
        whole = np.empty(self.shape, dtype)
        for layer, value in enumerate(self):
            whole[layer] = value
        return whole

    def each(self, function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Leaf:
        """Returns the stacked array of this `shape` whose layers are `function` of this one's."""
        return dataclasses.replace(self, shape=shape, read=lambda layer: function(self[layer]))


Leaves = Mapping[str, np.ndarray] | Mapping[str, Leaf] | Mapping[str, np.ndarray | Leaf]
"""Arrays by path, read or not."""


def as_leaf(path: str, array: np.ndarray | Leaf, dtype: np.dtype) -> Leaf:
    """Returns the array of that path in the type `dtype`."""
    stacked = LAYERS in path
    read = array.__getitem__ if stacked else lambda _: np.asarray(array)
    return Leaf(tuple(array.shape), np.dtype(dtype), stacked, read)
