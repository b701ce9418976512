"""The first things to change, read off a prediction. Each is one line with the option to set."""

from __future__ import annotations

from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.parallel.devices import GIB
from mole_jax.parallel.mesh import BATCH
from mole_jax.planning.predict import Prediction

SPARE = 0.05
"""Share of the memory to leave free: a straight line through two depths and the allocator both err."""


def advise(arch: LlavaArchitecture, plan: Prediction) -> list[str]:
    """Returns what to change first, then second; says so when nothing is to be changed."""
    if plan.memory.available is None:
        return ["no memory size is known for this chip, so whether it fits is yours to judge"]
    return too_large(plan) if not plan.memory.fits else room_left(arch, plan)


def too_large(plan: Prediction) -> list[str]:
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
    if plan.remat != "full":
        stronger = {"none": "dots", "dots": "full"}[plan.remat]
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


def room_left(arch: LlavaArchitecture, plan: Prediction) -> list[str]:
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
    if plan.remat == "full":
        kept = products_bytes(arch, tokens, plan.mesh["tensor"])
        if kept <= spare:
            lines.append(
                f"{spare / GIB:.1f} GiB are free and keeping the matrix products takes about {kept / GIB:.1f}: "
                "--model.remat dots spares the second forward pass"
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


def products_bytes(arch: LlavaArchitecture, tokens: float, tensor: int) -> float:
    """Bytes on one of `tensor` devices of the decoder's matrix products, bfloat16, each with its adapter's as large."""
    decoder = arch.decoder
    divided = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim + 2 * decoder.mlp_width
    return 4.0 * (2 * decoder.width + divided / tensor) * decoder.layers * tokens
