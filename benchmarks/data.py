"""``python -m benchmarks.data``: how fast records become rows, from each container, beside what a GPU needs.

The same records with JPEG pictures of 640 x 480 are read from JSON with files, parquet, ArrayRecord (as
``data convert`` writes it) and a tensorflow-datasets set, and are tokenised, decoded to 336 x 336 and packed as in
training, with 0, 1 and 2 worker processes. They run in turn, so that a drifting machine touches all alike. What a core
does is the examples over the processor's seconds that all processes used. Counting an epoch (pictures are looked at,
not decoded) is timed too. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.measuring import machine
from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data import counting
from mole_jax.data.containers import array_record
from mole_jax.data.mixture import Mixture
from mole_jax.errors import run_door
from mole_jax.files import write_json, write_text
from mole_jax.image_spec import ImageSpec
from mole_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PACKAGES = ("grain", "pyarrow", "array-record", "tensorflow-datasets", "pillow", "sentencepiece")
FIRST = "JSON and files"
WORKERS = (0, 1, 2)
ROW_GROUP = 100
"""Rows of a parquet file's group, as `datasets` writes those with pictures."""
ROWS = 16
"""Of a batch."""
_TEXT = "the a of in to and is with patient image shows left lung scan table total value chart year what"
WORDS = tuple(_TEXT.split())

# What one H100 takes: docs/pods.md has 245 TFLOP for a step of llava15_7b_mole of 32 rows of 2,048 on 8 GPUs.
FLOP_PER_TOKEN = 245.0e12 * 8 / (32 * 2048)
PEAK, SHARE = 989e12, 0.5
"""Dense bfloat16 FLOP/s of an H100 (data sheet), and the share of it that is supposed: what is predicted for TPUs."""


def made(folder: Path, records: int, seed: int = 0) -> list[dict[str, Any]]:
    """Writes pictures and returns LLaVA records: 1 to 5 rounds, answers of 5 to 50 words."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(records):
        small = draw.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(picture + draw.integers(-12, 12, picture.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=85)
        turns = []
        for turn in range(int(draw.integers(1, 6))):
            question, answer = (" ".join(draw.choice(WORDS, n)) for n in (12, int(draw.integers(5, 50))))
            turns.append({"from": "human", "value": "<image>\n" * (turn == 0) + question + "?"})
            turns.append({"from": "gpt", "value": answer})
        made.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(made))
    return made


def containers(folder: Path, records: list[dict[str, Any]]) -> dict[str, str]:
    """Writes the records in every container; returns their paths as a domain names them."""
    inside = [one | {"image": (folder / one["image"]).read_bytes()} for one in records]
    pq.write_table(pa.Table.from_pylist(inside), folder / "records.parquet", row_group_size=ROW_GROUP)
    array_record.write(folder / "shards", iter(inside), total=len(inside), shards=4)
    _prepare(folder / "tfds", inside)
    os.environ["TFDS_DATA_DIR"] = str(folder / "tfds")
    paths = {FIRST: "records.json", "parquet": "records.parquet", "ArrayRecord": "shards"}
    return {name: str(folder / path) for name, path in paths.items()} | {"TFDS": "tfds:benchmark_set:train"}


def _prepare(folder: Path, records: list[dict[str, Any]]) -> None:
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(encoding_format="jpeg"),
        "conversations": tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()}),
    }

    class BenchmarkSet(tfds.core.GeneratorBasedBuilder):
        name = "benchmark_set"
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
            for one in records:
                yield one["id"], one | {"image": io.BytesIO(one["image"])}

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        BenchmarkSet(data_dir=str(folder), file_format="array_record").download_and_prepare()


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the records are read: as for LLaVA-1.5."""

    tokenizer: Tokenizer
    sequence_length: int = 2048

    def mixture(self, path: str, workers: int, epochs: float | None = None, rows: int = ROWS) -> Mixture:
        domain = DomainConfig("all", path)
        data = DataConfig((domain,), sequence_length=self.sequence_length, workers=workers)
        image = ImageSpec(size=336, side=24, token_id=32000)
        return Mixture.build(data, seed=0, tokenizer=self.tokenizer, image=image, rows=rows, epochs=epochs)


def speed(mixture: Mixture, seconds: float) -> dict[str, float]:
    """Draws batches for so many seconds after the first; returns what they held, by the second and by the core's."""
    next(mixture)  # starts the workers
    process = psutil.Process()
    totals, batches = np.zeros(3), 0
    start, used = time.perf_counter(), _processor_seconds(process)
    while (wall := time.perf_counter() - start) < seconds or not batches:
        batch = next(mixture)
        totals += len([name for row in batch.record_ids for name in row]), batch.loss_mask.sum(), _tokens(batch)
        batches += 1
    used = _processor_seconds(process) - used
    examples, _, tokens = totals.tolist()
    mixture.close()
    return {"examples/s": examples / wall, "examples/s/core": examples / used, "tokens/example": tokens / examples}


def _tokens(batch: Any) -> int:
    return int((batch.segment_ids > 0).sum())


def _processor_seconds(process: psutil.Process) -> float:
    own = [process, *process.children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in own)


def measured(setting: Setting, paths: dict[str, str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measures every container with every number of workers in turn; returns a row for each."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    candidates = [(name, workers) for workers in WORKERS for name in paths]
    for number in range(rounds):
        for name, workers in candidates[:: -1 if number % 2 else 1]:
            result = speed(setting.mixture(paths[name], workers), seconds)
            found.setdefault((name, workers), []).append(result)
    rows = []
    for name, workers in candidates:
        ratios = {
            unit: statistics.median(
                own[unit] / first[unit] for own, first in zip(found[name, workers], found[FIRST, workers], strict=True)
            )
            for unit in ("examples/s", "examples/s/core")
        }
        middle = {
            unit: statistics.median(one[unit] for one in found[name, workers]) for unit in found[name, workers][0]
        }
        rows.append({"container": name, "workers": workers, "ratio": ratios["examples/s/core"], **middle})
    return rows


def epoch(setting: Setting, path: str, epochs: float) -> list[dict[str, Any]]:
    """Times the counting of an epoch by one process and by as many as there are cores."""
    mixture = setting.mixture(path, 0, epochs, rows=128)
    examples, few = round(epochs * mixture.examples_per_epoch), counting.FEW
    rows = []
    for several in (False, True):
        counting.FEW = 0 if several else examples
        processes = counting.processes(16, examples)
        start = time.perf_counter()
        batches = mixture.count_batches()
        wall = time.perf_counter() - start
        rows.append({"processes": processes, "examples": examples, "batches": batches, "seconds": wall})
    counting.FEW = few
    return rows


def page(result: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    about = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    need = result["need"]
    lines = [
        "# Data: examples a second from each container",
        "",
        f"Made by `python -m benchmarks.data --rounds {result['rounds']}`. The ratio is that of examples a second and "
        f"core to {FIRST}, with as many workers: the median of the rounds, in which candidates run in turn.",
        "",
        f"- Machine: {about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['system']}. When "
        f"it began, {about['load_before']} processes ran or waited. The files lay in the system's cache.",
        f"- Versions: {versions}.",
        f"- {result['records']:,} records, each with a JPEG of 640 x 480 ({result['picture_kb']:.0f} kB) and "
        f"{need['tokens/example']:.0f} tokens, drawn at random; one picture to an example, so pictures a second are "
        f"examples a second. Parquet has row groups of {ROW_GROUP}.",
        f"- One H100 takes {need['examples/s']:.1f} examples a second of LLaVA-1.5 7B with MoLE: "
        f"{need['tokens/s']:,.0f} tokens at {100 * SHARE:.0f} % (supposed) of {PEAK / 1e12:.0f} TFLOP/s and "
        f"{FLOP_PER_TOKEN / 1e9:.1f} GFLOP a token (docs/pods.md).",
        "",
        "| ratio | container | workers | examples/s | examples/s/core | cores for one H100 |",
        "|" + " --- |" * 6,
    ]
    for row in result["reading"]:
        lines.append(
            f"| **{row['ratio']:.2f}** | {row['container']} | {row['workers']} | {row['examples/s']:.0f} | "
            f"{row['examples/s/core']:.0f} | {need['examples/s'] / row['examples/s/core']:.2f} |"
        )
    one, several = result["epoch"]
    lines += ["", "## Counting an epoch", "", "| processes | examples | seconds | examples/s |", "|" + " --- |" * 4]
    for row in (one, several):
        speed = row["examples"] / row["seconds"]
        lines.append(f"| {row['processes']} | {row['examples']:,} | {row['seconds']:.1f} | {speed:,.0f} |")
    return "\n".join(lines) + "\n"


def result_of(tokenizer: Tokenizer, records: int, rounds: int, seconds: float, epochs: float) -> dict[str, Any]:
    """Makes the data in a folder of its own and measures."""
    setting, about = Setting(tokenizer), machine(PACKAGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = containers(folder, made(folder, records))
        size = statistics.fmean(file.stat().st_size for file in folder.glob("*.jpg")) / 1000
        reading = measured(setting, paths, rounds, seconds)
        counted = epoch(setting, paths[FIRST], epochs)
    tokens = statistics.fmean(row["tokens/example"] for row in reading)
    rate = PEAK * SHARE / FLOP_PER_TOKEN
    return {
        "rounds": rounds,
        "records": records,
        "picture_kb": size,
        "machine": about,
        "need": {"tokens/s": rate, "tokens/example": tokens, "examples/s": rate / tokens},
        "reading": reading,
        "epoch": counted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "assets" / "quickstart_base", help="its folder")
    parser.add_argument("--records", type=int, default=1000, help="of the data")
    parser.add_argument("--rounds", type=int, default=3, help="times each candidate is measured")
    parser.add_argument("--seconds", type=float, default=4, help="that each is measured for")
    parser.add_argument("--epochs", type=float, default=30, help="of the data, as the epoch that is counted")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the two files")
    flags = parser.parse_args()
    result = result_of(Tokenizer.load(flags.tokenizer), flags.records, flags.rounds, flags.seconds, flags.epochs)
    text = page(result)
    flags.output.mkdir(parents=True, exist_ok=True)
    write_json(flags.output / "data.json", result)
    write_text(flags.output / "data.md", text)
    print(text)


if __name__ == "__main__":
    run_door(main)
