"""``python -m benchmarks.inference``: what a mixture of LoRA experts costs at inference, as a ratio to plain LoRA.

The programs are the sampler's own. Merged base (no adapters), plain LoRA and MoLE of the same rank share one set of
base weights and run in one process, one after the other in each round, so that a drifting machine touches all alike.
Prints, for each batch size, the median seconds of a prefill and of a decoded token, the medians of their ratios to
plain LoRA, and what does not depend on the machine's mood: the ratios of the FLOPs and bytes of the compiled decoding
(a layer, the head and the draw) and of the weights that a step reads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mole_jax.config import AdapterConfig, DecodingConfig, MeshConfig
from mole_jax.model.architecture import DecoderArchitecture, LlavaArchitecture, VisionArchitecture
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import flatten, unflatten
from mole_jax.serving.decode import programs
from mole_jax.serving.draw import Settings
from mole_jax.serving.sampler import Sampler, bucket
from mole_jax.weights.open import place
from mole_jax.weights.sources import RandomSource


class Variant:
    """A model, and one prefill and one decoding of it that wait for the device."""

    def __init__(self, arch: LlavaArchitecture, adapter: AdapterConfig, dtype: str, base: dict[str, jax.Array]):
        """`base` holds the weights that are there already and takes those that are made."""
        self.mesh = make_mesh(MeshConfig(data=1))
        self.spec = ModelSpec.of(arch, adapter)
        if not base:
            base.update(place(self.spec, RandomSource(arch, 0), self.mesh, (), dtype, 0))
        abstract = self.spec.abstract(self.mesh, ("adapters", "router"), dtype)
        made = self.spec.initial({path: leaf for path, leaf in abstract.items() if path not in base}, 0)
        leaves = {path: base.get(path, made.get(path)) for path in abstract}
        self.sampler = Sampler(
            self.spec.graph,
            self.mesh,
            batch_size=1,
            eos_ids=(-1,),  # no token has it, so that no row ends before the others
            dtype=jnp.dtype(dtype),
            decoding=DecodingConfig(),
        )
        self.weights = self.sampler.weights(unflatten(leaves), {})
        self.step_bytes = sum(
            leaf.nbytes
            for path, leaf in flatten(self.weights).items()
            if path.startswith("decoder/") and path != "decoder/embedding"
        )

    def runs(self, rows: int, length: int, tokens: int) -> tuple[Callable, Callable, Callable]:
        """Returns ``prefill() -> state``, ``decode(state)``, which adds `tokens` tokens, and its ``cost(state)``."""
        vision = self.spec.arch.vision
        prompts = {
            "tokens": np.random.default_rng(0).integers(3, 1000, (rows, length)).astype(np.int32),
            "lengths": np.full(rows, length, np.int32),
            "images": np.zeros((0, vision.image_size, vision.image_size, 3), np.uint8),
        }
        settings = Settings.of([DecodingConfig(max_new_tokens=tokens + 2)] * rows, range(rows))
        common = {"graph": self.spec.graph, "dtype": self.sampler.dtype, "eos_ids": (-1,), "weights": self.weights}
        run = programs(self.mesh)

        def prefill():
            with jax.set_mesh(self.mesh):
                return jax.block_until_ready(
                    run.prefill(**common, capacity=bucket(tokens + 2), prompts=prompts, settings=settings)
                )

        ahead = {**common, "settings": settings, "until": np.int32(tokens + 1)}

        def decode(state):
            with jax.set_mesh(self.mesh):
                return jax.block_until_ready(run.extend(**ahead, state=state))

        def cost(state) -> np.ndarray:
            with jax.set_mesh(self.mesh):
                found = run.extend.lower(**ahead, state=state).compile().cost_analysis()  # pyright: ignore[reportFunctionMemberAccess]
            return np.asarray([found["flops"], found["bytes accessed"], self.step_bytes])

        return prefill, decode, cost


def measure(
    variants: dict[str, Variant], rows: int, length: int, tokens: int, rounds: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns, by variant, seconds (rounds, 2) of prefill and token, and (FLOPs, bytes, weight bytes) of decoding."""
    runs = {name: variant.runs(rows, length, tokens) for name, variant in variants.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, (prefill, decode, _) in runs.items():
            start = time.perf_counter()
            state = prefill()
            middle = time.perf_counter()
            decode(state)
            if round_:  # the first one compiles
                seconds[name].append((middle - start, (time.perf_counter() - middle) / tokens))
    costs = {name: cost(prefill()) for name, (prefill, _, cost) in runs.items()}
    return {name: np.asarray(times) for name, times in seconds.items()}, costs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__)
    parser.add_argument("--width", type=int, default=4096, help="decoder width d; the MLP is 2.6875 times as wide")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=12, help="tokens decoded")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--rounds", type=int, default=7, help="counted runs of each variant")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16 but on CPU")
    flags = parser.parse_args()
    device = jax.devices()[0]
    dtype = flags.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    heads = flags.width // 64
    decoder = DecoderArchitecture(
        vocab=2048,
        width=flags.width,
        mlp_width=round(flags.width * 2.6875),
        layers=flags.layers,
        heads=heads,
        kv_heads=heads,
        head_dim=64,
        max_position=flags.length + flags.tokens + 2,
    )
    vision = VisionArchitecture(width=32, mlp_width=64, layers=2, heads=2, image_size=28, patch_size=14)
    arch = LlavaArchitecture(vision, decoder, image_token_id=2047)
    base: dict[str, jax.Array] = {}
    adapters = {
        "merged base": AdapterConfig(kind="none"),
        f"LoRA r={flags.rank}": AdapterConfig(kind="lora", rank=flags.rank, alpha=2.0 * flags.rank),
        f"MoLE E={flags.experts} r={flags.rank}": AdapterConfig(
            kind="mole", rank=flags.rank, alpha=2.0 * flags.rank, experts=flags.experts
        ),
    }
    variants = {name: Variant(arch, adapter, dtype, base) for name, adapter in adapters.items()}
    lora = list(variants)[1]
    print(
        f"{device.device_kind}, jax {jax.__version__}, {dtype}: d {flags.width}, {flags.layers} layers, prompts of "
        f"{flags.length}, {flags.tokens} new tokens, {flags.rounds} rounds; ratios to {lora}, in [] their range"
    )
    for rows in flags.batches:
        times, costs = measure(variants, rows, flags.length, flags.tokens, flags.rounds)
        for name, seconds in times.items():
            ratios = seconds / times[lora]
            cells = [
                f"{what} {statistics.median(column):8.4f} s {statistics.median(ratio):6.3f} "
                f"[{min(ratio):.3f}, {max(ratio):.3f}]"
                for what, column, ratio in zip(("prefill", "token"), seconds.T, ratios.T, strict=True)
            ]
            flops, moved, weights = costs[name] / costs[lora]
            print(
                f"batch {rows:3}  {name:16} {'  '.join(cells)}  compiled: FLOPs {flops:.3f}, bytes {moved:.3f}, "
                f"weights {weights:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
