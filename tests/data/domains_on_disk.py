"""Small domains written to disk for the tests of the mixture."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from PIL import Image

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data.mixture import Mixture
from mole_jax.image_spec import ImageSpec
from mole_jax.tokenizer import Tokenizer

IMAGE = ImageSpec(size=8, side=1, token_id=900, vectors=True)


def record(identity: str, question: str = "What is it?", answer: str = "A dog.", image=None) -> dict:
    """Returns a LLaVA record; with an image the question begins with its mark."""
    marks = "" if image is None else "<image>\n" * (len(image) if isinstance(image, list) else 1)
    turns = [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "conversations": turns} | ({} if image is None else {"image": image})


def write(folder: pathlib.Path, name: str, records: list) -> str:
    """Writes a JSON file and returns its path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def write_image(folder: pathlib.Path, name: str, colour: tuple[int, int, int] = (10, 20, 30)) -> str:
    """Writes a small image of one colour and returns its name."""
    Image.new("RGB", (6, 4), colour).save(folder / name)
    return name


def domain(folder: pathlib.Path, name: str, count: int, *, image: bool = True, **fields) -> DomainConfig:
    """Writes a domain of `count` records, each with its own colour, and returns its configuration."""
    rng = np.random.default_rng(len(name) + count)
    records = []
    for i in range(count):
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        file = write_image(folder, f"{name}{i}.png", colour) if image else None
        records.append(record(f"{name}{i}", "What is it? " * (1 + i % 3), f"It is {i}. " * (1 + i % 4), file))
    return DomainConfig(name, write(folder, name, records), **fields)


def build(data: DataConfig, tokenizer: Tokenizer, *, rows: int = 2, seed: int = 0, **options) -> Mixture:
    """Builds a mixture with images of 8 pixels that take 3 positions."""
    return Mixture.build(
        data,
        seed=seed,
        tokenizer=tokenizer,
        rows=rows,
        image=IMAGE,
        **options,
    )


def same(a, b) -> bool:
    """Returns whether two batches are equal bit for bit, record names too."""
    arrays = zip(a.arrays().items(), b.arrays().items(), strict=True)
    return a.record_ids == b.record_ids and all(
        n == m and x.dtype == y.dtype and np.array_equal(x, y) for (n, x), (m, y) in arrays
    )
