"""``python -m benchmarks``: what a mixture of LoRA experts costs in a training step, as a ratio to plain LoRA.

All variants run in one process, one step of each in turn, so that a drifting machine touches all alike. The decoder is
a Llama of the given width; the loss, the optimizer and the adapters are those of a real run. Prints one line per
variant: trainable numbers, median seconds per step, and the median of its ratios to plain LoRA of the same rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from mole_jax.config import AdapterConfig, Config, DataConfig, DomainConfig, MeshConfig, ModelConfig, TrainConfig
from mole_jax.model.architecture import DecoderArchitecture, LlavaArchitecture, VisionArchitecture
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import put_batch
from mole_jax.parameters import split_trainable
from mole_jax.study.config import equal_parameters, plain
from mole_jax.training.setup import compiled_step, prepare
from mole_jax.weights.open import place
from mole_jax.weights.sources import RandomSource

TRAINABLE = {"none": ("projector",), "lora": ("adapters",), "mole": ("adapters", "router")}


def variants(rank: int, experts: int, arch: DecoderArchitecture) -> dict[str, AdapterConfig]:
    """Plain LoRA first: the others are compared with it."""
    mole = AdapterConfig(kind="mole", rank=rank, alpha=2.0 * rank, experts=experts)
    equal = equal_parameters(mole, arch)
    return {
        f"LoRA r={rank}": plain(mole),
        f"MoLE E={experts} r={rank}": mole,
        f"MoLE E={experts} r={rank} dense": dataclasses.replace(mole, router_gradient="dense"),
        f"LoRA r={equal.rank} (equal parameters)": equal,
        f"MoLE E={experts} r={rank} grouped": dataclasses.replace(mole, expert_path="grouped"),
    }


def stepper(
    arch: LlavaArchitecture, adapter: AdapterConfig, rows: int, length: int, dtype: str
) -> tuple[int, Callable]:
    """Returns the trainable numbers and a function that takes one training step and waits for it."""
    config = Config(
        model=ModelConfig(preset="tiny", frozen_dtype=dtype, compute_dtype=dtype, remat="full"),
        adapter=adapter,
        data=DataConfig(domains=(DomainConfig("all", "-"),), sequence_length=length, examples_per_row=4),
        train=TrainConfig(steps=100, batch_rows=rows, trainable=TRAINABLE[adapter.kind]),
        mesh=MeshConfig(data=1),
    )
    mesh = make_mesh(config.mesh)
    spec = ModelSpec.of(arch, adapter)
    leaves = place(spec, RandomSource(arch, 0), mesh, config.train.trainable, dtype, 0)
    params, frozen = split_trainable(leaves, spec.declarations, config.train.trainable)
    train_step, state = prepare(config, spec, mesh, params, total_steps=100)
    step = compiled_step(train_step, state, mesh)
    side = arch.vision.image_size
    tokens = np.random.default_rng(0).integers(3, arch.decoder.vocab - 1, (rows, length)).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    batch = put_batch(
        {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=1),
            "loss_mask": ones,
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            "segment_ids": ones,
            "domain_ids": np.zeros_like(ones),
            "images": np.zeros((rows, 1, side, side, 3), np.uint8),
        },
        mesh,
    )
    held = [state]

    def take() -> None:
        with jax.set_mesh(mesh):
            held[0], output = step(held[0], frozen, batch)
        if not bool(jax.device_get(output["finite"])):
            raise RuntimeError("the step gave a NaN")

    return sum(leaf.size for leaf in jax.tree.leaves(params)), take


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--width", type=int, default=512, help="decoder width d; the MLP is 2.6875 times as wide")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=9, help="counted steps of each variant")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16 but on CPU")
    flags = parser.parse_args()
    device = jax.devices()[0]
    dtype = flags.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    decoder = DecoderArchitecture(
        vocab=2048,
        width=flags.width,
        mlp_width=round(flags.width * 2.6875),
        layers=flags.layers,
        heads=flags.width // 64,
        kv_heads=flags.width // 64,
        head_dim=64,
        max_position=flags.length,
    )
    vision = VisionArchitecture(width=32, mlp_width=64, layers=2, heads=2, image_size=28, patch_size=14)
    arch = LlavaArchitecture(vision, decoder, image_token_id=2047)
    steps = {}
    for name, adapter in variants(flags.rank, flags.experts, decoder).items():
        steps[name] = stepper(arch, adapter, flags.rows, flags.length, dtype)
        steps[name][1]()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(flags.runs):
        for name, (_, take) in steps.items():
            start = time.perf_counter()
            take()
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds))
    print(
        f"{device.device_kind}, jax {jax.__version__}, {dtype}: d {flags.width}, {flags.layers} layers, "
        f"{flags.rows} x {flags.length} tokens, full rematerialisation, {flags.runs} steps each; ratios to {first}"
    )
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[first], strict=True))
        print(f"{name:36} {steps[name][0]:>12,} trainable  {statistics.median(times):8.4f} s/step  {ratio:6.3f}")


if __name__ == "__main__":
    main()
