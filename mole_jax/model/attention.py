"""Attention: the one place that decides which keys a query sees, and by which kernel the result is computed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import get_args

import jax
from jaxtyping import Array, Float, Int

from mole_jax.config import AttentionKernel
from mole_jax.errors import UserError
from mole_jax.model.kernels import blocks, gpu, splash, xla
from mole_jax.parallel.devices import kind_in_force, on_hopper
from mole_jax.parallel.mesh import batch_shards
from mole_jax.parallel.region import on_each_device
from mole_jax.parallel.sharding import partition

PLATFORMS = {"splash": "TPU", "triton": "NVIDIA", "mosaic": "NVIDIA"}
"""First word of the `device_kind` that a kernel is written for; the others run anywhere."""

WIDTHS = (64, 128, 256)
"""Widths of a head that the kernels of `PLATFORMS` are built for."""


def attention(
    q: Float[Array, "B H S C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    *,
    causal: bool,
    segment_ids: Int[Array, "B S"] | None = None,
    kernel: AttentionKernel = "auto",
) -> Float[Array, "B S H*C"]:
    """Returns scaled dot-product attention among the tokens of a row, with float32 softmaxes; heads come back joined.

    Args:
        q, k, v: queries, keys and values; heads are grouped (H is a multiple of K).
        causal: a query sees no key after its own place.
        segment_ids: a query sees only the keys of its own segment, whose tokens stand side by side. Needs `causal`.
        kernel: how it is computed; see `chosen` for auto.

    Outside of a region every device computes the rows and heads that it holds.
    """
    mesh = jax.sharding.get_abstract_mesh()
    one_device = mesh.empty or mesh.size == 1
    name = chosen(kernel, q.shape[-1])
    if not one_device and q.shape[0] % batch_shards(mesh):
        # Images of a few questions: no kernel can be given a part of a row, but XLA's partitioner can.
        name, one_device = "xla", True
    run = functools.partial(_KERNELS[name], causal=causal)
    if not one_device:
        heads, kv_heads = partition("batch", "heads", None, None), partition("batch", "kv_heads", None, None)
        ids = None if segment_ids is None else partition("batch")
        run = on_each_device(run, (heads, kv_heads, kv_heads, ids), heads)
    y = run(q, k, v, segment_ids)
    return y.swapaxes(1, 2).reshape(len(y), y.shape[2], -1)


def chosen(kernel: AttentionKernel, width: int) -> str:
    """Returns the kernel that is used for heads of some width on the devices in force.

    auto: splash on TPUs, mosaic on a Hopper, triton on other GPUs (also when a step is compiled for GPUs that are not
    here: mosaic's compiler wants to see the card), blocks on CPUs. Without tokamax, or for a width that its kernels are
    not built for, the others are blocks too.
    """
    if kernel != "auto":
        return kernel
    kind = kind_in_force()
    if kind not in PLATFORMS.values() or not _has_tokamax() or width not in WIDTHS:
        return "blocks"
    if kind == "TPU":
        return "splash"
    return "mosaic" if on_hopper() else "triton"


def check(kernel: AttentionKernel, kind: str) -> None:
    """Checks that a kernel can run on devices whose `device_kind` begins with `kind`.

    Raises:
        UserError: it is for other devices, or tokamax is not installed.
    """
    wanted = PLATFORMS.get(kernel)
    if wanted is None:
        return
    if wanted != kind:
        others = ", ".join(name for name in get_args(AttentionKernel) if PLATFORMS.get(name, kind) == kind)
        raise UserError(
            f"config: model.attention {kernel} runs on {wanted} devices, not on {kind}; take one of {others}"
        )
    if not _has_tokamax():
        raise UserError(f"config: model.attention {kernel} needs tokamax: pip install 'mole-jax[kernels]'")


def described(kernel: AttentionKernel, width: int) -> str:
    """Returns the kernel in force, and why a faster one is not, as a line for the log."""
    name, kind = chosen(kernel, width), kind_in_force()
    if kernel != "auto" or name != "blocks" or kind not in PLATFORMS.values():
        return name
    if not _has_tokamax():
        return f"{name} (the kernels for {kind} devices need tokamax: pip install 'mole-jax[kernels]')"
    return f"{name} (the kernels for {kind} devices take heads of {', '.join(map(str, WIDTHS))}, not of {width})"


def _splash(*arrays: Array | None, causal: bool) -> Array:
    return splash.attend(*arrays, causal=causal, interpret=kind_in_force() == "cpu")  # pyright: ignore[reportArgumentType]


_KERNELS: dict[str, Callable[..., Array]] = {
    "xla": xla.attend,
    "blocks": blocks.attend,
    "splash": _splash,
    "triton": functools.partial(gpu.attend, kernel="triton"),
    "mosaic": functools.partial(gpu.attend, kernel="mosaic"),
}


@functools.cache
def _has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None
