"""``python -m benchmarks.tpu_cost``: what a mixture of LoRA experts costs on a TPU, by the TPU's own compiler.

No TPU is needed, but libtpu. The 7B decoder's whole training step (text only, full rematerialisation) and a step of
decoding are compiled for one chip at two depths; the compiler's estimated cycles and the memory are drawn on to all
layers. Ratios are to plain LoRA of the same rank. Compiles take minutes each, one after the other, and are cached.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.__main__ import TRAINABLE, variants
from mole_jax.config import AdapterConfig, Config, DataConfig, DomainConfig, MeshConfig, ModelConfig, TrainConfig
from mole_jax.model.architecture import LlavaArchitecture, preset
from mole_jax.parallel.devices import CHIPS, GIB
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import replicated
from mole_jax.parameters import Tree, flatten, unflatten
from mole_jax.planning.compile import Step, abstract_step, compile_step, device_bytes, facts_of, with_layers
from mole_jax.planning.predict import DEPTHS, at_depth, kernel_time
from mole_jax.planning.report import right_aligned
from mole_jax.planning.topology import devices_of, no_accelerator

MIXTURES = ((3, 32), (8, 32), (8, 128))
"""(experts, rank), each compared with plain LoRA of that rank and with plain LoRA of as many parameters."""


def config_of(adapter: AdapterConfig, rows: int, length: int) -> Config:
    """Returns a run of one chip without images."""
    return Config(
        model=ModelConfig(preset="vicuna-7b", remat="full"),
        adapter=adapter,
        data=DataConfig(domains=(DomainConfig("all", "-"),), sequence_length=length, tiles_per_row=0),
        train=TrainConfig(steps=1000, batch_rows=rows, trainable=TRAINABLE[adapter.kind]),
        mesh=MeshConfig(data=1),
    )


def lower_decode(step: Step, rows: int, slots: int) -> jax.stages.Lowered:
    """Lowers one step of greedy decoding: `rows` sequences, one token each, `slots` places in the cache."""
    everywhere, dtype = replicated(step.mesh), jnp.dtype(jnp.bfloat16)

    def next_token(params, frozen, tokens, kv):
        decoder = nnx.merge(step.spec.graph, params, frozen).decoder
        hidden, kv = decoder.cached(decoder.embed(tokens, dtype), kv, jnp.ones(rows, jnp.int32))
        return jnp.argmax(decoder.logits(hidden[:, -1]), axis=-1), kv

    def abstract(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree)

    def empty(params, frozen):
        return nnx.merge(step.spec.graph, params, frozen).decoder.empty_cache(rows, slots, dtype)

    with jax.set_mesh(step.mesh):
        params = decoding_types(step.state.params)
        kv = abstract(jax.eval_shape(empty, params, step.frozen))
        tokens = jax.ShapeDtypeStruct((rows, 1), np.int32, sharding=everywhere)
        return jax.jit(next_token, donate_argnums=3).lower(params, step.frozen, tokens, kv)


def decoding_types(params: Tree) -> Tree:
    """Returns trainable weights as the sampler has them: adapters in the type of activations."""
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding)
            if "/adapter/" in path
            else leaf
            for path, leaf in flatten(params).items()
        }
    )


def measure(adapter: AdapterConfig, arch: LlavaArchitecture, flags: argparse.Namespace) -> dict[str, float]:
    """Returns cycles and peak bytes of training and decoding at the whole depth."""
    config, cache = config_of(adapter, flags.rows, flags.length), Path(flags.cache).expanduser()
    mesh = make_mesh(config.mesh, devices_of(flags.topology)[:1])
    found: dict[str, float] = {}
    chip = CHIPS[mesh.devices.flat[0].device_kind]
    whole = abstract_step(config, arch, mesh)
    held = device_bytes((whole.state.params, whole.frozen))
    kv = 2 * arch.decoder.layers * flags.answers * flags.length * arch.decoder.kv_heads * arch.decoder.head_dim * 2
    arguments = {
        "train": held + device_bytes((whole.state.opt_state, whole.batch)),
        "decode": device_bytes((decoding_types(whole.state.params), whole.frozen)) + kv,
    }
    for what in flags.what:
        facts = []
        for depth in DEPTHS:
            shallow = with_layers(arch, depth)
            if what == "train":
                facts.append(compile_step(config, shallow, mesh, flags.topology, cache))
            else:
                step = abstract_step(config, shallow, mesh)
                lowered = lower_decode(step, flags.answers, flags.length)
                facts.append(facts_of(lowered, mesh, depth, flags.topology, cache))
        deep = at_depth(facts[0], facts[1], arch.decoder.layers)
        # Grouped experts are kernels without an estimate.
        cycles = (deep.cycles or 0) + kernel_time(deep.kernels, chip) * (chip.clock or 0)
        found |= {f"{what} cycles": cycles, f"{what} bytes": deep.temporary + deep.code + arguments[what]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_cost", description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2", help="whose chip; default: v5e:2x2")
    parser.add_argument("--rows", type=int, default=2, help="rows of the training batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row, and places in the decoding cache")
    parser.add_argument("--answers", type=int, default=16, help="sequences decoded at a time")
    parser.add_argument("--dropout", type=float, default=0.0, help="0.05 as in the recipes compiles far longer")
    parser.add_argument("--path", choices=("auto", "masked", "grouped"), default="auto", help="adapter.expert_path")
    parser.add_argument("--mixtures", nargs="+", default=[f"{e}x{r}" for e, r in MIXTURES], metavar="ExR")
    parser.add_argument("--what", nargs="+", choices=("train", "decode"), default=["train", "decode"])
    parser.add_argument("--cache", default="~/.cache/mole_jax/plan")
    flags = parser.parse_args()
    no_accelerator()
    arch = preset("vicuna-7b")
    wanted: dict[str, tuple[AdapterConfig, str]] = {}
    for mixture in flags.mixtures:
        experts, rank = map(int, mixture.split("x"))
        for name, adapter in variants(rank, experts, arch.decoder).items():
            if adapter.router_gradient != "dense" and adapter.expert_path == "auto":
                changed = dataclasses.replace(adapter, dropout=flags.dropout, expert_path=flags.path)
                wanted[name] = (changed, f"LoRA r={rank}")
    measured: dict[str, dict[str, float]] = {}
    for name, (adapter, _) in wanted.items():
        print(f"{len(measured) + 1} of {len(wanted)}: {name}", file=sys.stderr)
        measured[name] = measure(adapter, arch, flags)
    columns = list(next(iter(measured.values())))
    rows = [["", *(cell for column in columns for cell in (column, "ratio"))]]
    for name, values in measured.items():
        base, cells = measured[wanted[name][1]], [name]
        for column in columns:
            value = values[column]
            form = f"{value / 1e6:,.1f} M" if column.endswith("cycles") else f"{value / GIB:.2f} GiB"
            cells += [form, f"{value / base[column]:.4f}"]
        rows.append(cells)
    print(
        f"{flags.topology}, one chip, jax {jax.__version__}: {arch.decoder.layers} layers from {DEPTHS}; training "
        f"{flags.rows} x {flags.length} tokens, dropout {flags.dropout}; decoding {flags.answers} sequences, "
        f"{flags.length} places; estimated cycles and peak memory, ratios to plain LoRA of the same rank"
    )
    print(right_aligned(rows))


if __name__ == "__main__":
    main()
