"""Bandwidth of the mesh's axes, the disk of the workdir, and pictures decoded."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from mole_jax.data.image import load_image
from mole_jax.diagnosis.finding import Finding
from mole_jax.parallel import hosts
from mole_jax.parallel.devices import chip_of

NUMBERS = 1 << 22
"""float32 numbers that an axis gathers, and that a checkpoint has: 16 MiB."""
FEW_PICTURES = 20.0
"""Pictures a second and core below which it is told."""
SLOW_LINK = 0.05
"""Part of a chip's links below which an axis is told to be slow."""


def bandwidths(mesh: jax.sharding.Mesh) -> Iterator[Finding]:
    """Yields, for each axis of several devices, what a device receives a second when 16 MiB are gathered along it."""
    chip = chip_of(mesh.devices.flat[0])
    for axis, size in mesh.shape.items():
        if size == 1:
            continue
        x = _zeros(mesh, PartitionSpec(axis))
        gather = jax.jit(lambda x: x + 0, out_shardings=NamedSharding(mesh, PartitionSpec()))
        gather(x).block_until_ready()
        rate = x.nbytes * (size - 1) / size / min(_seconds(lambda x=x, f=gather: f(x)) for _ in range(5))
        slow = chip is not None and chip.links is not None and rate < SLOW_LINK * chip.links
        advice = f"put devices that are joined by a fast link side by side on mesh.{axis}, or set it to 1"
        name, found = f"mesh.{axis} {size}", f"{rate / 1e9:.2f} GB/s received"
        yield Finding(name, found, "off", advice) if slow else Finding(name, found)


def storage(workdir: epath.Path, mesh: jax.sharding.Mesh) -> Finding:
    """Returns whether a checkpoint comes back as it was written, and how fast it is; nothing of it stays."""
    folder = workdir / ".doctor"
    value = _zeros(mesh, PartitionSpec(mesh.axis_names)) + jax.process_count()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            start = time.perf_counter()
            checkpointer.save(folder, {"x": value}, force=True)
            checkpointer.wait_until_finished()
            middle = time.perf_counter()
            back = checkpointer.restore(folder, {"x": value})["x"]
            back.block_until_ready()
            end = time.perf_counter()
        equal = bool(
            jax.jit(lambda a, b: (a == b).all(), out_shardings=NamedSharding(mesh, PartitionSpec()))(back, value)
        )
    except Exception as error:  # each store's library has errors of its own
        reason = " ".join(str(error).split())[:120]
        advice = "look at the name, the space that is left and your rights; all hosts must see the same folder"
        return Finding("checkpoint", f"fails: {type(error).__name__}: {reason}", "off", advice)
    finally:
        hosts.barrier("doctor's checkpoint")
        if hosts.is_first() and folder.exists():
            folder.rmtree()
    speed = f"{value.nbytes / 1e6 / (middle - start):.0f} MB/s written, {value.nbytes / 1e6 / (end - middle):.0f} read"
    if not equal:
        return Finding(
            "checkpoint", speed, "wrong", f"{workdir} gives back other numbers than were written; use another"
        )
    return Finding("checkpoint", speed)


def pictures(seconds: float) -> Finding:
    """Returns how many photographs of 640 x 480 one core decodes and squares to 336 pixels a second."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG")
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds or count == 0:
        load_image(file.getvalue(), None, size=336, aspect="pad", max_pixels=1 << 20)
        count += 1
    found = f"{count / taken:.0f} a second and core"
    advice = "raise data.workers, or store smaller pictures"
    return Finding("pictures", found, "off", advice) if count / taken < FEW_PICTURES else Finding("pictures", found)


def _zeros(mesh: jax.sharding.Mesh, spec: PartitionSpec) -> jax.Array:
    size = NUMBERS // mesh.size * mesh.size
    sharding = NamedSharding(mesh, spec)
    return jax.jit(lambda: jax.numpy.arange(size, dtype="float32"), out_shardings=sharding)()


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
