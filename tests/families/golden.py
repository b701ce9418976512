"""The families' goldens: a checkpoint, its cases, and where features go in a row, computed here by other means."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mole_jax.config import AdapterConfig, MeshConfig
from mole_jax.image_spec import NEWLINE, AnyRes
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import unflatten
from mole_jax.weights.open import open_source, place

FOLDER = Path(__file__).parents[1] / "goldens" / "families"
NAMES = (
    "llava_qwen2",
    "llava_qwen3",
    "llava_next_vicuna",
    "llava_next_mistral",
    "llava_onevision",
    "smolvlm",
    "internvl",
)
CASES = ("wide", "tall", "two", "text")
LENGTH = 160
"""Positions of a row: the longest text of all goldens."""
TAPS = 4
"""Features that one position may be a sum of."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row, padded to LENGTH positions and to the golden's slots."""

    expected: dict[str, np.ndarray]
    tokens: np.ndarray
    """(LENGTH,), 0 after the text."""
    tiles: np.ndarray
    """(M, H, W, 3) normalised, 0 after the last."""
    sources: np.ndarray
    """(LENGTH, TAPS)."""
    weights: np.ndarray

    @property
    def length(self) -> int:
        return len(self.expected["input_ids"])


class Golden:
    """A checkpoint, its cases, and programs compiled once for all of them."""

    def __init__(self, name: str):
        self.name, self.folder = name, FOLDER / name
        self.source = open_source(str(self.folder))
        self.arch = self.source.architecture
        values = dict(np.load(self.folder / "expected.npz"))
        expected = {
            case: {key.removeprefix(case + "/"): one for key, one in values.items() if key.startswith(case + "/")}
            for case in CASES
        }
        pictures = {case: _pictures(self.arch, one) for case, one in expected.items()}
        self.slots = max(sum(map(len, tiles)) for tiles in pictures.values())
        self.cases = {case: self._case(one, pictures[case]) for case, one in expected.items()}

    def _case(self, expected: dict[str, np.ndarray], pictures: list[np.ndarray]) -> Case:
        side, span = self.arch.vision.image_size, self.arch.image_span
        tiles = np.zeros((self.slots, side, side, 3), np.float32)
        ids = expected["input_ids"]
        tokens, places = np.zeros(LENGTH, np.int32), np.flatnonzero(ids == self.arch.image_token_id)
        tokens[: len(ids)] = ids
        sources, weights = np.zeros((LENGTH, TAPS), np.int32), np.zeros((LENGTH, TAPS), np.float32)
        used = begun = 0
        for number, tiled in enumerate(pictures):
            tiles[used : used + len(tiled)] = tiled
            rows = packed(self.arch, expected, number, len(tiled))
            for position, taps in zip(places[begun : begun + len(rows)], rows, strict=True):
                for tap, (source, weight) in enumerate(taps):
                    sources[position, tap] = source if source == NEWLINE else source + used * span
                    weights[position, tap] = weight
            used, begun = used + len(tiled), begun + len(rows)
        assert begun == len(places), "the layout has other positions than the text"
        return Case(expected, tokens, tiles, sources, weights)

    def spec(self, adapter: AdapterConfig) -> ModelSpec:
        return ModelSpec.of(self.arch, adapter)

    def place(self, spec: ModelSpec, mesh: MeshConfig | None = None):
        """Returns the mesh and the model's arrays, in float32."""
        made = make_mesh(MeshConfig(data=1) if mesh is None else mesh)
        trained = ("adapters", "router")
        return made, unflatten(place(spec, self.source, made, trained, "float32", 0))


def forward(graph):
    """Returns a compiled function of arrays and batch: hidden states, logits and image features of each row."""

    @jax.jit
    def run(leaves, tokens, images, lengths, sources, weights):
        model = nnx.merge(graph, leaves)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        x = model.embed(tokens, images, jnp.dtype("float32"), sources=sources, weights=weights)
        hidden, _ = model.decoder(x, positions, segments)
        return x, hidden, model.decoder.logits(hidden)

    return run


def batch_of(cases: list[Case]):
    """Returns the arguments of `forward` after the arrays."""
    return (
        jnp.asarray(np.stack([case.tokens for case in cases])),
        jnp.asarray(np.stack([case.tiles for case in cases])),
        jnp.asarray([case.length for case in cases], jnp.int32),
        jnp.asarray(np.stack([case.sources for case in cases])),
        jnp.asarray(np.stack([case.weights for case in cases])),
    )


def _pictures(arch, expected: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Returns the tiles (N, H, W, 3) of each picture; the processor has padded some to the same number."""
    if "pixel_values" not in expected:
        return []
    pixels = np.moveaxis(expected["pixel_values"], -3, -1)
    if not isinstance(arch.tiling, AnyRes):
        # Which picture a tile is of does not matter where features follow each other.
        return [pixels.reshape(-1, *pixels.shape[-3:])]
    # OneVision cuts a picture that its processor got alone; of these cases all were given so.
    alone = [one == 1 for one in expected.get("batch_num_images", np.ones(len(pixels)))]
    counts = [tiles_of(arch, size) if cut else 1 for size, cut in zip(expected["image_sizes"], alone, strict=True)]
    return [one[:count] for one, count in zip(pixels, counts, strict=True)]


def best(arch, size) -> tuple[int, int]:
    """Returns the resolution that keeps most of a picture's pixels, and of those the one that wastes least."""

    def worth(resolution):
        height, width = (int(one) for one in size)
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(arch.tiling.resolutions, key=worth)


def tiles_of(arch, size) -> int:
    height, width = best(arch, size)
    return 1 + (height // arch.vision.image_size) * (width // arch.vision.image_size)


def packed(arch, expected: dict[str, np.ndarray], number: int, tiles: int) -> list[list[tuple[int, float]]]:
    """Returns for each position of a picture the features, with shares, that it is the sum of."""
    side, base = arch.vision.grid, [[(i, 1.0)] for i in range(tiles * arch.image_span)]
    if not isinstance(arch.tiling, AnyRes):
        return base
    newline = [(NEWLINE, 1.0)]
    if tiles == 1:
        return [*base, newline]
    height, width = (int(one) for one in expected["image_sizes"][number])
    rows, columns = (one // arch.vision.image_size for one in best(arch, (height, width)))
    grid = np.arange(side * side, tiles * side * side).reshape(rows, columns, side, side)
    grid = grid.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    # The picture was padded to the resolution's shape; features of the padding go.
    if width / height > grid.shape[1] / grid.shape[0]:
        cut = (grid.shape[0] - int(round(height * (grid.shape[1] / width), 7))) // 2
        grid = grid[cut : grid.shape[0] - cut]
    else:
        cut = (grid.shape[1] - int(round(width * (grid.shape[0] / height), 7))) // 2
        grid = grid[:, cut : grid.shape[1] - cut]
    shape = grid.shape
    if arch.tiling.most is not None:
        ratio = math.sqrt(shape[0] * shape[1] / (arch.tiling.most * side**2))
        if ratio > 1.1:
            shape = int(shape[0] // ratio), int(shape[1] // ratio)
    lines = [[_bilinear(grid, shape, y, x) for x in range(shape[1])] for y in range(shape[0])]
    return [*base[: side * side], *(one for line in lines for one in (*line, newline))]


def _bilinear(grid: np.ndarray, shape: tuple[int, int], y: int, x: int) -> list[tuple[int, float]]:
    """Returns the four neighbours of the centre of a cell (y, x) of a grid that is scaled to `shape`."""

    def neighbours(place: int, size: int, target: int):
        centre = max((place + 0.5) * size / target - 0.5, 0.0)
        low = min(int(centre), size - 1)
        return ((low, 1 - (centre - low)), (min(low + 1, size - 1), centre - low))

    return [
        (int(grid[row, column]), above * left)
        for row, above in neighbours(y, grid.shape[0], shape[0])
        for column, left in neighbours(x, grid.shape[1], shape[1])
    ]
