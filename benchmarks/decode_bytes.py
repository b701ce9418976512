"""``python -m benchmarks.decode_bytes``: the bytes that a step of decoding moves, over those that it must, on a TPU.

No TPU is needed, but libtpu. A step of the 7B with MoLE (E = 3, r = 32) is compiled for one chip at `--layers` layers;
its loop over the layers then counts as 32. What it must move is the decoder's weights without the embedding, and the
cache, each read once. The bytes moved are the planner's count, the time is the compiler's estimate.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax

from benchmarks.__main__ import variants
from benchmarks.tpu_cost import config_of, decoding_types, lower_decode
from mole_jax.model.architecture import preset
from mole_jax.parallel.devices import GIB, chip_of
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import flatten
from mole_jax.planning.compile import abstract_step, device_bytes, with_layers
from mole_jax.planning.cost import cost_of
from mole_jax.planning.hlo import HloModule, Instruction
from mole_jax.planning.topology import devices_of, no_accelerator


class Deep(HloModule):
    """A program whose loops over the layers run as often as the whole model has layers."""

    def __init__(self, text: str, layers: int, whole: int):
        super().__init__(text)
        self.depth = {layers: whole}

    def trips(self, loop: Instruction) -> int:
        found = super().trips(loop)
        return self.depth.get(found, found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_bytes", description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2", help="whose chip; default: v5e:2x2")
    parser.add_argument("--layers", type=int, default=3, help="layers compiled; no other loop may run as often")
    parser.add_argument("--rows", type=int, default=16, help="sequences decoded at a time")
    parser.add_argument("--slots", type=int, default=2048, help="places in the cache")
    flags = parser.parse_args()
    no_accelerator()
    arch = preset("vicuna-7b")
    adapter = next(one for one in variants(32, 3, arch.decoder).values() if one.kind == "mole")
    config = config_of(dataclasses.replace(adapter, dropout=0.0), 2, flags.slots)
    mesh = make_mesh(config.mesh, devices_of(flags.topology)[:1])
    whole, step = (abstract_step(config, one, mesh) for one in (arch, with_layers(arch, flags.layers)))
    compiled = lower_decode(step, flags.rows, flags.slots).compile()
    cost = cost_of(Deep(compiled.as_text() or "", flags.layers, arch.decoder.layers), dict(mesh.shape))
    read = flatten(decoding_types(whole.state.params)) | flatten(whole.frozen)
    held = device_bytes([leaf for path, leaf in read.items() if path.startswith("decoder/layers/")])
    weights = held + device_bytes([read["decoder/head/kernel"]])
    cache = 2 * arch.decoder.layers * flags.rows * flags.slots * arch.decoder.kv_heads * arch.decoder.head_dim * 2
    chip, must, memory = chip_of(mesh.devices.flat[0]), weights + cache, compiled.memory_analysis()
    assert chip is not None
    assert chip.clock is not None
    assert chip.bandwidth is not None
    assert memory is not None
    print(
        f"{flags.topology}, one chip, jax {jax.__version__}, {flags.rows} rows x {flags.slots} places, {flags.layers} "
        f"layers compiled: {cost.traffic / 1e9:.1f} GB moved over weights {weights / 1e9:.1f} GB and cache "
        f"{cache / 1e9:.1f} GB: {cost.traffic / must:.2f}; by the estimated time "
        f"{(cost.cycles or 0) / chip.clock * chip.bandwidth / must:.2f}; temporary memory "
        f"{memory.temp_size_in_bytes / GIB:.3f} GiB beside a cache of "
        f"{cache / arch.decoder.layers * flags.layers / GIB:.3f} GiB"
    )


if __name__ == "__main__":
    main()
