"""Compiles a config's real training step for devices that are not there, and keeps what the compiler said."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mole_jax import compat
from mole_jax.config import Config
from mole_jax.data.tiling.pictures import row_taps
from mole_jax.errors import UserError
from mole_jax.files import absolute, read_json, write_json
from mole_jax.model.architecture import PRESETS, LlavaArchitecture
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import batch_sharding, check_rows
from mole_jax.parameters import Tree, split_trainable
from mole_jax.planning.cost import Collective, Kernels, cost_of
from mole_jax.planning.hlo import HloModule
from mole_jax.planning.topology import compiler_version, devices_of, one_at_a_time
from mole_jax.training.setup import compiled_step, prepare
from mole_jax.training.step import TrainState, TrainStep
from mole_jax.weights.open import open_base

HUB_PRESETS = {
    "llava-hf/llava-1.5-7b-hf": "vicuna-7b",
    "liuhaotian/llava-v1.5-7b": "vicuna-7b",
    "llava-hf/llava-1.5-13b-hf": "vicuna-13b",
    "liuhaotian/llava-v1.5-13b": "vicuna-13b",
    "llava-hf/llava-v1.6-mistral-7b-hf": "llava-next-mistral-7b",
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": "llava-onevision-0.5b",
    "HuggingFaceTB/SmolVLM-500M-Instruct": "smolvlm-500m",
    "OpenGVLab/InternVL3-1B-hf": "internvl3-1b",
}
"""Architectures of bases that need not be here to be planned."""

FACTS_VERSION = 4
"""Part of the cache's key: raise it when `Facts` or what is read into it changes."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the compiler said of one program; bytes are those of one device."""

    layers: int
    temporary: int
    code: int
    needed: int | None
    """Set if the program does not fit the device: what it would need. The compiler then says nothing else."""
    cycles: int | None
    traffic: int
    kept: int
    kernels: Kernels
    collectives: tuple[Collective, ...]
    seconds: float
    """What compiling took here."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step on abstract arrays, ready to be lowered."""

    spec: ModelSpec
    mesh: jax.sharding.Mesh
    train_step: TrainStep
    state: TrainState
    frozen: Tree
    batch: dict[str, jax.ShapeDtypeStruct]


def architecture_of(config: Config, preset: str | None = None) -> LlavaArchitecture:
    """Returns the architecture that a run of `config` would have, without its weights.

    Args:
        config: where `model.base` is a folder that is here, that is read; of the known hub names the preset is taken.
        preset: taken instead of `model.base`.

    Raises:
        UserError: `model.base` is neither here nor known.
    """
    model = config.model
    if model.base is not None:
        preset = preset or HUB_PRESETS.get(model.base)
        if preset is None and not absolute(model.base).exists():
            raise UserError(
                f"config: model.base {model.base} is not here and no known hub name; give its architecture with "
                f"--preset ({', '.join(PRESETS)})"
            )
    if preset is not None:
        model = dataclasses.replace(model, base=None, preset=preset)
    return open_base(model, config.seed).architecture


def topology_mesh(config: Config, topology: str) -> jax.sharding.Mesh:
    """Returns the config's mesh over the devices of a topology.

    Raises:
        UserError: unknown topology; the mesh does not fit it, or leaves devices of it idle.
    """
    devices, asked = devices_of(topology), config.mesh
    size = asked.data * asked.fsdp * asked.expert * asked.tensor
    if 0 < size < len(devices):  # before a mesh is made: TPUs refuse some of these in words of their own
        raise UserError(
            f"config: the mesh takes {size} of the {len(devices)} devices of {topology} and would leave the "
            "others idle; set mesh.data to -1"
        )
    return make_mesh(asked, devices)


def abstract_step(config: Config, arch: LlavaArchitecture, mesh: jax.sharding.Mesh) -> Step:
    """Builds the training step as `training.setup` does, from shapes alone.

    Raises:
        UserError: mesh, batch and model do not divide.
    """
    check_rows(config.train.batch_rows, config.train.accumulation, mesh)
    spec = ModelSpec.of(arch, config.adapter)
    leaves = spec.abstract(mesh, config.train.trainable, config.model.float_dtype, config.model.quantised)
    trainable, frozen = split_trainable(leaves, spec.declarations, config.train.trainable)
    train_step, state = prepare(config, spec, mesh, trainable, total_steps=config.train.steps or 1000)
    rows, place, side = config.train.batch_rows, batch_sharding(mesh), arch.vision.image_size
    fields = ("tokens", "targets", "loss_mask", "positions", "segment_ids", "domain_ids")
    shape = (rows, config.data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=place) for name in fields}
    images = (rows, config.data.tiles_per_row, side, side, 3)
    batch["images"] = jax.ShapeDtypeStruct(images, np.uint8, sharding=place)
    if (taps := row_taps(arch.image)) is not None:
        for name, kind in (("sources", np.int32), ("weights", np.float32)):
            batch[name] = jax.ShapeDtypeStruct((*shape, taps), kind, sharding=place)
    return Step(spec=spec, mesh=mesh, train_step=train_step, state=state, frozen=frozen, batch=batch)


def with_layers(arch: LlavaArchitecture, layers: int) -> LlavaArchitecture:
    """Returns the architecture with another number of decoder layers."""
    return dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, layers=layers))


def compile_step(config: Config, arch: LlavaArchitecture, mesh: jax.sharding.Mesh, topology: str, cache: Path) -> Facts:
    """Compiles the training step for a topology; for the rest see `facts_of`."""
    step = abstract_step(config, arch, mesh)
    with jax.set_mesh(mesh), compat.for_absent_devices():
        lowered = compiled_step(step.train_step, step.state, mesh).lower(step.state, step.frozen, step.batch)
    return facts_of(lowered, mesh, arch.decoder.layers, topology, cache)


def facts_of(lowered: Any, mesh: jax.sharding.Mesh, layers: int, topology: str, cache: Path) -> Facts:
    """Compiles a program, or finds in `cache` what the same compiler said of the same program.

    One process compiles at a time; the others wait. A program that does not fit the device's memory gives `Facts`
    with `needed` set.
    """
    platform = mesh.devices.flat[0].platform
    words = [FACTS_VERSION, topology, jax.__version__, compiler_version(platform), [d.id for d in mesh.devices.flat]]
    key = hashlib.sha256(json.dumps(words).encode() + lowered.as_text().encode()).hexdigest()[:24]
    file = cache / f"{key}.json"
    with one_at_a_time(cache):
        if not file.exists():
            facts = _compile(lowered, mesh, layers, platform)
            write_json(file, {"program": key, "words": words, **dataclasses.asdict(facts)})
    return _read(read_json(file, remedy="delete it, and the step is compiled again"))


def _compile(lowered: Any, mesh: jax.sharding.Mesh, layers: int, platform: str) -> Facts:
    # Autotuning would run kernels on a card.
    options = {"xla_gpu_autotune_level": 0} if platform == "gpu" else None
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return Facts(
            layers=layers,
            temporary=0,
            code=0,
            needed=needed,
            cycles=None,
            traffic=0,
            kept=0,
            kernels=Kernels(),
            collectives=(),
            seconds=time.perf_counter() - start,
        )
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), cost_of(HloModule(compiled.as_text()), dict(mesh.shape))
    return Facts(
        layers=layers,
        # What is not written over an argument comes on top.
        temporary=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        needed=None,
        cycles=cost.cycles,
        traffic=cost.traffic,
        kept=cost.kept,
        kernels=cost.kernels,
        collectives=cost.collectives,
        seconds=seconds,
    )


def needed_bytes(message: str) -> int | None:
    """Returns how much memory a program needs by the compiler's message that it has too little; None for any other."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    if found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))


def _read(value: Mapping[str, Any]) -> Facts:
    fields = {field.name: value[field.name] for field in dataclasses.fields(Facts)}
    listed = [Collective(**{**one, "axes": tuple(one["axes"])}) for one in value["collectives"]]
    return Facts(**{**fields, "kernels": Kernels(**value["kernels"]), "collectives": tuple(listed)})


def device_bytes(tree: Any) -> int:
    """Returns the bytes that the arrays of `tree` take on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
