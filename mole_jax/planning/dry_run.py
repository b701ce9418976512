"""What a run would do on this machine: its data, shapes, memory and first examples; nothing is trained or written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mole_jax.config import Config
from mole_jax.data import left_out
from mole_jax.data.desk.show import preview
from mole_jax.data.load import check_room
from mole_jax.data.mixture import Mixture
from mole_jax.errors import UserError
from mole_jax.model import attention
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import check_rows
from mole_jax.planning.compile import abstract_step
from mole_jax.training.setup import compiled_step, of_base
from mole_jax.training.summary import format_table, trainable_table
from mole_jax.weights.open import check_image_token, open_model

SHOWN = 2
"""Examples of the first batch that are printed."""
MIB = 2**20


def dry_run(config: Config) -> Iterator[tuple[str, bool]]:
    """Yields what there is to say, line by line, and whether a line is a warning.

    Raises:
        UserError: whatever `training.setup.set_up` would refuse of config, base, data and mesh.
    """
    mesh = make_mesh(config.mesh)
    check_rows(config.train.batch_rows, config.train.accumulation, mesh)
    device = mesh.devices.flat[0]
    attention.check(config.model.attention, device.device_kind.split()[0])
    opened = open_model(config)
    check_image_token(opened.tokenizer, opened.source.architecture.image_token_id)
    config, arch = of_base(config, opened)
    check_room(config.data, arch.image, positions=arch.decoder.max_position)
    mixture = Mixture.build(
        config.data,
        seed=config.seed,
        tokenizer=opened.tokenizer,
        image=arch.image,
        rows=config.train.batch_rows,
        epochs=config.train.epochs,
    )
    trained = trainable_table(opened.spec.declarations, config.train.trainable)
    yield from ((line, False) for line in format_table(trained).split("\n"))
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    yield f"{mesh.devices.size} x {device.device_kind} ({axes})", False
    yield f"attention: {attention.described(config.model.attention, arch.decoder.head_dim)}", False
    surveyed = mixture.survey()
    yield from left_out.lines(surveyed, begin="records looked at")
    left_out.check(surveyed, config.data.most_skipped)
    batch = next(mixture, None)
    if batch is None:
        raise UserError("config: the mixture gives no batch; lower train.batch_rows or raise train.epochs")
    arrays = batch.arrays()
    yield "", False
    for name, array in arrays.items():
        yield f"{name:<14} {' x '.join(map(str, array.shape)):<20} {array.dtype}", False
    tokens, segments = int((arrays["segment_ids"] > 0).sum()), arrays["segment_ids"].max(axis=1)
    filled = tokens / arrays["tokens"].size
    yield (
        f"first batch: {int(segments.sum())} examples in {len(segments)} rows, {filled:.1%} of the places filled, "
        f"{int(arrays['loss_mask'].sum()):,} tokens supervised",
        False,
    )
    yield "", False
    yield from ((line, False) for line in preview(config.data, mixture.loader, SHOWN, seed=config.seed))
    yield "", False
    yield from _memory(config, arch, mesh)


def _memory(config: Config, arch: LlavaArchitecture, mesh: jax.sharding.Mesh) -> Iterator[tuple[str, bool]]:
    """Compiles the step on shapes alone and yields what one device holds while it runs."""
    step = abstract_step(config, arch, mesh)
    with jax.set_mesh(mesh):
        program = compiled_step(step.train_step, step.state, mesh).lower(step.state, step.frozen, step.batch).compile()
    parts = {"trainable parameters": step.state.params, "optimizer": step.state.opt_state, "frozen": step.frozen}
    held = {name: _bytes_of_a_device(tree) for name, tree in parts.items()} | {"batch": _bytes_of_a_device(step.batch)}
    if (analysis := program.memory_analysis()) is None:
        yield "this device's compiler does not tell what a step takes while it runs", True
    else:
        held["while a step runs"] = analysis.temp_size_in_bytes
    for name, size in held.items():
        yield f"{name:<22}{size / MIB:>12,.1f} MiB", False
    whole = sum(held.values())
    limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    of = "" if limit is None else f" of {limit / MIB:,.1f}"
    over = limit is not None and whole > limit
    yield f"{'one device':<22}{whole / MIB:>12,.1f} MiB{of}{': does not fit' if over else ''}", over


def _bytes_of_a_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
