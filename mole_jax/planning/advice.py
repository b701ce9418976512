"""The first things to change, read off a prediction. Each is one line with the option to set."""

from __future__ import annotations

from collections.abc import Mapping

from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parallel.devices import GIB
from mole_jax.parallel.mesh import BATCH
from mole_jax.planning.predict import Prediction
from mole_jax.planning.work import Work

SPARE = 0.05
"""Share of the memory to leave free: a straight line through two depths and the allocator both err."""


def advise(arch: LlavaArchitecture, plan: Prediction, works: Mapping[str, Work]) -> list[str]:
    """Returns what to change first, then second; says so when nothing is to be changed.

    `works` tells what each policy of `model.remat` computes and keeps (`mole_jax.planning.work.work_of`).
    """
    if plan.memory.available is None:
        return ["no memory size is known for this chip, so whether it fits is yours to judge"]
    return room_left(arch, plan, works) if plan.memory.fits else too_large(plan, works)


def too_large(plan: Prediction, works: Mapping[str, Work]) -> list[str]:
    """What makes a step smaller, in the order of what it costs: nothing, recomputation, collectives, batch."""
    memory, lines = plan.memory, []
    assert memory.available is not None
    over = memory.peak - memory.available
    lines.append(
        f"does not fit: {over / GIB:.1f} GiB over the {memory.available / GIB:.1f} GiB of a {plan.device_kind}"
    )
    held = memory.trainable + memory.frozen + memory.optimizer
    if held > 0.8 * memory.available or memory.frozen > memory.temporary:
        split = plan.mesh["fsdp"]
        while (
            split * 2 <= plan.devices // plan.mesh["tensor"] and held * plan.mesh["fsdp"] / split > memory.available / 2
        ):
            split *= 2
        if split > plan.mesh["fsdp"]:
            lines.append(f"weights and optimizer take {held / GIB:.1f} GiB: split them further, --mesh.fsdp {split}")
    less = {name: work.kept for name, work in works.items() if work.kept < works[plan.remat].kept}
    if less:
        stronger = max(less, key=lambda name: less[name])
        lines.append(
            f"activations kept for the backward pass take {memory.activations / GIB:.1f} GiB: --model.remat {stronger}"
        )
    rows = rows_per_device(plan)
    if rows / plan.accumulation >= 2:
        pieces = plan.accumulation * 2
        lines.append(f"the same update from smaller pieces, one after the other: --train.accumulation {pieces}")
    elif plan.accumulation == 1 and rows >= 1:
        lines.append(
            "a device already works on one row at a time: cut the row over devices with "
            f"--mesh.tensor {plan.mesh['tensor'] * 2}, or shorten it with --data.sequence_length {plan.length // 2}"
        )
    if len(lines) == 1:
        lines.append("take chips with more memory, or more of them with --mesh.fsdp raised to match")
    return lines


def room_left(arch: LlavaArchitecture, plan: Prediction, works: Mapping[str, Work]) -> list[str]:
    """What makes a step that fits faster."""
    memory, lines = plan.memory, []
    assert memory.available is not None
    spare = memory.available * (1 - SPARE) - memory.peak
    bound = plan.step_seconds is not None and (plan.network_seconds or 0.0) > plan.step_seconds
    if bound:
        worst = plan.exchanges[0]
        lines.append(
            f"the links are busier than the matrix units: {worst.kind} over {' x '.join(worst.axes)} sends "
            f"{worst.sent / GIB:.1f} GiB a step from each device"
        )
    tokens = rows_per_device(plan) / plan.accumulation * plan.length
    now = works[plan.remat]
    more = {name: tokens * work.kept_on(arch, plan.mesh["tensor"]) for name, work in works.items()}
    faster = [name for name in works if works[name].flops < now.flops and more[name] - more[plan.remat] <= spare]
    if faster:
        best = min(faster, key=lambda name: works[name].flops)
        lines.append(
            f"{spare / GIB:.1f} GiB are free and keeping more for the backward pass takes about "
            f"{(more[best] - more[plan.remat]) / GIB:.1f}: --model.remat {best} spares "
            f"{100 * (1 - works[best].flops / now.flops):.0f} % of the products"
        )
    used = memory.temporary + memory.batch
    times = int((spare + used) // max(1, used))
    if times >= 2:
        if plan.accumulation > 1:
            fewer = max(
                n for n in range(1, plan.accumulation) if plan.accumulation % n == 0 and plan.accumulation <= n * times
            )
            lines.append(f"pieces may be larger: --train.accumulation {fewer}")
        elif bound or not lines:
            rows = plan.rows * min(times, 4)
            lines.append(
                f"{spare / GIB:.1f} GiB are free: --train.batch_rows {rows} gathers weights for more tokens at once "
                "(another batch: raise the learning rate with care), or as many rows on fewer chips"
            )
    if bound and plan.mesh["fsdp"] > 1 and memory.peak + memory.frozen + memory.trainable <= memory.available:
        lines.append(f"gather less often: --mesh.fsdp {plan.mesh['fsdp'] // 2}, with more copies over data")
    return lines or ["fits; nothing stands out to be changed"]


def rows_per_device(plan: Prediction) -> float:
    """Rows of a batch that one device works on; devices of the tensor axis work on the same."""
    shards = 1
    for axis in BATCH:
        shards *= plan.mesh[axis]
    return plan.rows / shards
