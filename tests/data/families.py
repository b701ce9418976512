"""How the models of goldens/families take pictures: written by hand from their configs and processor configs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mole_jax.image_spec import AnyRes, Grid, ImageSpec, Single, Split

HALF = (0.5, 0.5, 0.5)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_NEXT = AnyRes(((56, 112), (112, 56), (112, 112), (168, 56), (56, 168)))
_ONEVISION = AnyRes(tuple((56 * rows, 56 * columns) for rows in range(1, 5) for columns in range(1, 5)), most=4)

SPECS = {
    "llava_qwen2": ImageSpec(56, 4, 6, tiling=Single(), fit="stretch", mean=HALF, std=HALF),
    "llava_qwen3": ImageSpec(56, 4, 6, tiling=Single(), fit="stretch", mean=HALF, std=HALF),
    "llava_next_vicuna": ImageSpec(56, 4, 6, tiling=_NEXT, fit="stretch"),
    "llava_next_mistral": ImageSpec(56, 4, 6, tiling=_NEXT, fit="stretch"),
    "llava_onevision": ImageSpec(56, 4, 6, tiling=_ONEVISION, fit="stretch"),
    "smolvlm": ImageSpec(56, 2, 6, tiling=Split(168), resample="lanczos", mean=HALF, std=HALF),
    "internvl": ImageSpec(56, 2, 6, tiling=Grid(1, 6), **IMAGENET),
}
CASES = ("wide", "tall", "two", "text")


class Golden:
    """One family's folder."""

    def __init__(self, folder: Path):
        self.folder, self.name, self.spec = folder, folder.name, SPECS[folder.name]
        self.cases = {case["name"]: case for case in json.loads((folder / "cases.json").read_text())["cases"]}
        self.expected = np.load(folder / "expected.npz")

    def pictures(self, case: str) -> list[Image.Image]:
        return [Image.open(self.folder / name).convert("RGB") for name in self.cases[case]["pictures"]]

    def pixels(self, case: str) -> list[np.ndarray]:
        """The expected tiles of each picture, as uint8 levels that were not rounded, (N, H, W, 3)."""
        values = self.expected[f"{case}/pixel_values"]
        values = values[0] if self.name == "smolvlm" else values
        channels_last = np.moveaxis(values.astype(np.float64), -3, -1)
        return 255 * (channels_last * np.array(self.spec.std) + np.array(self.spec.mean))
