"""The converter holds a layer's tensor, not a stack of layers and not a shard.

A checkpoint of 300 MB in shards of 45 MB, with stacked leaves of 68 MB: the resident set may grow by 1.3 shards at
most. The allocator is told to give memory back at once, or at this size its slack would be measured.
(`benchmarks/convert_memory.py` measures the whole 7B, with whole processes as they are.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARD = 45_000_000
CHILD = """
import dataclasses, json, pathlib, shutil, sys
import ml_dtypes, numpy as np
from mole_jax.model.architecture import PRESETS
from mole_jax.weights.convert import convert
from mole_jax.weights.formats.hf import write_hf
from mole_jax.weights.leaf import Leaf
from mole_jax.weights.names import leaf_specs

def resident(what):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(what)]
    return int(line.split()[1]) * 1024

def make(folder, width, mlp_width, layers, shard):
    arch = PRESETS["tiny"]
    decoder = dataclasses.replace(
        arch.decoder, width=width, mlp_width=mlp_width, layers=layers, kv_heads=4, head_dim=width // 4
    )
    arch = dataclasses.replace(arch, decoder=decoder)
    specs, rng, dtype = leaf_specs(arch), np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    def leaf(path):
        shape = specs[path].shape
        part = shape[1:] if specs[path].stacked else shape
        draw = lambda layer: rng.integers(0, 0x4000, part, np.uint16).view(dtype)
        return Leaf(shape, dtype, specs[path].stacked, draw)
    write_hf(folder, arch, {path: leaf(path) for path in specs}, max_shard_bytes=shard)

def both_ways(source, out):
    grown = {}
    for to, given, output in (("hf", source, "hf"), ("run", source, "run"), ("hf", out / "run", "back")):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
        before = resident("VmRSS")
        convert(str(given), str(out / output), to)
        grown[f"{given.name} -> {output}"] = resident("VmHWM") - before
    return grown

folder, shard = pathlib.Path(sys.argv[1]), int(sys.argv[2])
make(folder / "small", 32, 64, 2, shard)
both_ways(folder / "small", folder / "once")  # what the first use of every library takes
make(folder / "large", 1024, 2752, 12, shard)
print(json.dumps(both_ways(folder / "large", folder / "out")))
"""


def test_the_peak_stays_under_the_largest_shard(tmp_path):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(SHARD)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    sizes = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert len(sizes) >= 6
    grown = json.loads(ran.stdout.splitlines()[-1])
    print(grown)
    assert grown.keys() == {"large -> hf", "large -> run", "run -> back"}
    assert max(grown.values()) < 1.3 * max(sizes), grown
    # And all of it went through: the same bytes came back, in one file here.
    from mole_jax.weights.hf_checkpoint import HfCheckpoint

    before, after = (HfCheckpoint.open(tmp_path / name) for name in ("large", "out/back"))
    path = "decoder/layers/mlp/gate_proj/kernel"
    for layer in (0, 11):
        index = (slice(layer, layer + 1), slice(None), slice(None))
        assert (before.read(path, index) == after.read(path, index)).all()
