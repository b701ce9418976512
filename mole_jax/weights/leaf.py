"""An array of a model that is read when asked for, one layer at a time.

Layers are stacked on the first axis of our arrays (`mole_jax.weights.names`), and a stack of 32 can be larger than a
file of the checkpoint. Whoever takes an array layer by layer takes a `Leaf` as well: both have a shape, are indexed
and iterated over by layer, and become a numpy array by `np.asarray`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

LAYERS = "/layers/"
"""Part of the path of every array whose first axis is the layers."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that stays in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """Type of the whole: wide enough for every layer."""
    stacked: bool
    """The first axis is layers, each read on its own; otherwise the array is read as one."""
    read: Callable[[int], np.ndarray]
    """Returns the value of a layer, or of the whole array (of layer 0) where it is not stacked; in any type."""
    dtypes: tuple[np.dtype, ...] = ()
    """Type of each layer, where they are not all of the type `dtype`."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def part_bytes(self) -> int:
        """Bytes of what is read at a time."""
        return self.size // (self.shape[0] if self.stacked else 1) * self.dtype.itemsize

    def dtype_of(self, layer: int) -> np.dtype:
        """Returns the type in which a layer is read."""
        return self.dtypes[layer] if self.dtypes else self.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, layer: int) -> np.ndarray:
        """Returns a layer of a stacked array."""
        if not self.stacked or not 0 <= layer < len(self):
            raise IndexError(layer)
        return self.read(layer).astype(self.dtype_of(layer), copy=False)

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


def as_leaf(path: str, array: np.ndarray | Leaf, dtype: np.dtype | None = None) -> Leaf:
    """Returns the array of that path in the type `dtype`; with None, in the types that it has."""
    if isinstance(array, Leaf):
        return array if dtype is None else dataclasses.replace(array, dtype=np.dtype(dtype), dtypes=())
    stacked = LAYERS in path
    read = array.__getitem__ if stacked else lambda _: array
    return Leaf(tuple(array.shape), np.dtype(array.dtype if dtype is None else dtype), stacked, read)


def tensor(shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]) -> Leaf:
    """Returns a tensor of a file to be written, which `read` makes when its turn comes."""
    return Leaf(shape, np.dtype(dtype), False, lambda _: read())


def types_by_size(leaves: Iterable[Leaf]) -> list[np.dtype]:
    """Returns the types of arrays, that of the most numbers first."""
    sizes = Counter[np.dtype]()
    for leaf in leaves:
        for dtype in leaf.dtypes or (leaf.dtype,):
            sizes[dtype] += leaf.size // max(len(leaf.dtypes), 1)
    return [dtype for dtype, _ in sizes.most_common()]


def main_type(leaves: Iterable[Leaf]) -> np.dtype:
    """Returns the type of most numbers of arrays, of which there is at least one."""
    return types_by_size(leaves)[0]


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Returns a type that holds all numbers of the given ones: float32 for float16 and bfloat16 together."""
    found = list(dict.fromkeys(dtypes))
    return found[0] if len(found) == 1 else np.dtype(np.float32)
