"""Peak host memory of `convert` on a checkpoint in the shape of LLaVA-1.5 7B, random weights.

    python -m benchmarks.convert_memory [--scratch DIR] [--layers N] [--shard-gb 5]

Makes a Hugging Face folder of bfloat16 shards and a MoLE run (E=3, r=32) on it, converts them in child processes, and
prints the largest resident set of each (the kernel's count, memory-mapped files included), alone and without what a
process that only imports the converter takes, as multiples of the largest shard read or written. Target: under 1.3.
With all 32 layers it needs about 50 GB of disk: outputs are removed before the next conversion.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from mole_jax.config import AdapterConfig
from mole_jax.files import absolute
from mole_jax.model.architecture import LlavaArchitecture, preset
from mole_jax.model.spec import ModelSpec
from mole_jax.parameters import group_of
from mole_jax.weights import run
from mole_jax.weights.formats.hf import write_hf
from mole_jax.weights.leaf import LAYERS, Leaf
from mole_jax.weights.names import leaf_specs
from mole_jax.weights.open import open_source

TARGET = 1.3
TRAINABLE = ("adapters", "router", "projector")


def random_leaf(path: str, shape: tuple[int, ...], dtype: np.dtype) -> Leaf:
    """Returns an array of random numbers in [0, 2), drawn when read."""
    stacked, rng = LAYERS in path, np.random.default_rng(0)
    part = shape[1:] if stacked else shape

    def read(_: int) -> np.ndarray:
        # Random bits under the largest finite exponent: far cheaper than a distribution, and as incompressible.
        return rng.integers(0, 0x4000, part, np.uint16).view(ml_dtypes.bfloat16)

    return Leaf(shape, dtype, stacked, read)


def make_hf(folder: Path, arch: LlavaArchitecture, shard_bytes: int) -> None:
    specs, dtype = leaf_specs(arch), np.dtype(ml_dtypes.bfloat16)
    leaves = {path: random_leaf(path, spec.shape, dtype) for path, spec in specs.items()}
    write_hf(folder, arch, leaves, max_shard_bytes=shard_bytes)


def make_mole(folder: Path, base: Path, arch: LlavaArchitecture) -> None:
    adapter = AdapterConfig(rank=32, experts=3)
    declared = ModelSpec.of(arch, adapter).declarations
    leaves = {
        path: random_leaf(path, tuple(parameter.shape), np.dtype(np.float32))
        for path, parameter in declared.items()
        if group_of(parameter) in TRAINABLE
    }
    base_hash = open_source(str(base)).content_hash()
    meta = run.Meta(arch, adapter, TRAINABLE, "v1", "pad", base=str(base), base_hash=base_hash, seed=0)
    run.write_params(absolute(str(folder)), leaves, meta)


def peak_of(*command: str) -> tuple[float, float]:
    """Runs python with these arguments; returns its peak resident set in bytes and its seconds."""
    start = time.monotonic()
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"python {' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024, time.monotonic() - start


def largest_shard(*folders: Path) -> int:
    """Returns the bytes of the largest safetensors file in any of the folders."""
    return max((file.stat().st_size for folder in folders for file in folder.glob("*.safetensors")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert_memory", description="Peak host memory of the converter."
    )
    parser.add_argument("--scratch", help="folder for the files; default: the system's own for such files")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers; the 7B has 32")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of a shard in the made checkpoint")
    flags = parser.parse_args()

    arch = preset("vicuna-7b")
    arch = dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, layers=flags.layers))
    with tempfile.TemporaryDirectory(dir=flags.scratch) as name:
        folder = Path(name)
        hf = folder / "hf"
        make_hf(hf, arch, int(flags.shard_gb * 1e9))
        make_mole(folder / "mole", hf, arch)
        shard = largest_shard(hf)
        baseline, _ = peak_of("-c", "import mole_jax.weights.convert")
        print(f"{flags.layers} layers, {len(list(hf.glob('*.safetensors')))} shards, the largest {shard / 1e9:.2f} GB")
        print(f"a process that only imports the converter: {baseline / 1e9:.2f} GB")
        print(f"{'conversion':<14}{'peak GB':>9}{'/ shard':>9}{'less import':>13}{'seconds':>9}")
        worst = 0.0
        base, out = folder / "base", folder / "out"
        for label, source, to, output, done_with in (
            ("hf -> hf", hf, "hf", out, (out,)),
            ("hf -> run", hf, "run", base, ()),
            ("run -> hf", base, "hf", out, (out, base)),
            ("mole -> hf", folder / "mole", "hf", out, (out,)),
        ):
            peak, seconds = peak_of(
                "-m", "mole_jax.convert", "--input", str(source), "--output", str(output), "--to", to
            )
            largest = max(shard, largest_shard(output))
            worst = max(worst, peak / largest)
            ratios = f"{peak / largest:>9.2f}{(peak - baseline) / largest:>13.2f}"
            print(f"{label:<14}{peak / 1e9:>9.2f}{ratios}{seconds:>9.0f}", flush=True)
            for one in done_with:
                shutil.rmtree(one)
    print(f"worst {worst:.2f} of the largest shard: {'under' if worst < TARGET else 'OVER'} the target of {TARGET}")
    sys.exit(worst >= TARGET)


if __name__ == "__main__":
    main()
