"""What the machine can do at most, by each library, and what share of it attention's kernels reach. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mole_jax.config import AttentionKernel
from mole_jax.model import attention

KERNELS: dict[str, tuple[AttentionKernel, ...]] = {"cpu": ("blocks", "xla"), "gpu": ("mosaic", "triton", "blocks")}
"""By JAX's platform, what `model.attention` can be there; XLA's S x S scores do not fit at a GPU's sizes."""


def products(side: int, dtype: str, device: str) -> dict[str, Callable[[], object]]:
    """Returns a product of two (side, side) matrices by each library; it does 2 side**3 FLOPs."""
    values = np.random.default_rng(0).normal(size=(side, side)).astype(np.float32)
    ours, theirs = jnp.asarray(values, jnp.dtype(dtype)), torch.from_numpy(values).to(device, getattr(torch, dtype))
    multiply = jax.jit(lambda x: x @ x)
    return {"jax": lambda: multiply(ours).block_until_ready(), "torch": lambda: waited(theirs @ theirs)}


def copies(size: int, device: str) -> dict[str, Callable[[], object]]:
    """Returns a copy of `size` float32 numbers by each library; it moves 8 bytes a number."""
    ours, theirs = jnp.zeros(size, jnp.float32), torch.zeros(size, device=device)
    target = torch.empty_like(theirs)
    # A negation, for XLA returns a plain copy's argument itself. Given back, its buffer is used again, as torch's is.
    copy = jax.jit(lambda x, old: -x, donate_argnums=1, keep_unused=True)
    held = [jnp.zeros(size, jnp.float32)]

    def run() -> None:
        held[0] = copy(ours, held[0]).block_until_ready()

    return {"jax": run, "torch": lambda: waited(target.copy_(theirs))}


def waited(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` when it is there."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return x


def attention_flops(shape: tuple[int, int, int, int]) -> tuple[float, float]:
    """Returns FLOPs of causal attention, forward and with its backward pass, of heads (B, S, H, C).

    Two products forward and five backward (the scores are computed again), each of half of S x S.
    """
    rows, length, heads, width = shape
    product = 2.0 * rows * heads * length * length / 2 * width
    return 2 * product, 7 * product


def attentions(
    shape: tuple[int, int, int, int], dtype: str, device: str
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """Returns by name a causal attention of (B, S, H, C), and the same with its backward pass.

    As in both libraries' decoders it takes (B, H, S, C) and gives (B, S, H, C).
    """
    rng, heads_first = np.random.default_rng(0), tuple(shape[axis] for axis in (0, 2, 1, 3))
    arrays = [rng.normal(size=size).astype(np.float32) for size in (*3 * (heads_first,), shape)]
    *given, dy = (jnp.asarray(one, jnp.dtype(dtype)) for one in arrays)
    segments = jnp.ones(shape[:2], jnp.int32)
    forward, both = {}, {}
    for kernel in KERNELS[jax.default_backend()]:

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, kernel: AttentionKernel = kernel) -> jax.Array:
            return attention.attention(q, k, v, causal=True, segment_ids=segments, kernel=kernel).reshape(shape)

        def pulled(dy: jax.Array, *given: jax.Array, attend: Callable = attend) -> object:
            y, pull = jax.vjp(attend, *given)
            return y, pull(dy)

        one, two = jax.jit(attend), jax.jit(pulled)
        forward[kernel] = lambda one=one: jax.block_until_ready(one(*given))
        both[kernel] = lambda two=two: jax.block_until_ready(two(dy, *given))
    *tensors, dtensor = (torch.from_numpy(one).to(device, getattr(torch, dtype)) for one in arrays)
    q, k, v = (one.requires_grad_() for one in tensors)

    def sdpa() -> torch.Tensor:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).contiguous()

    def ahead() -> torch.Tensor:
        with torch.no_grad():
            return waited(sdpa())

    def back() -> tuple[torch.Tensor, ...]:
        y = sdpa()
        return tuple(waited(one) for one in (y, *torch.autograd.grad(y, (q, k, v), dtensor)))

    return {**forward, "torch sdpa": ahead}, {**both, "torch sdpa": back}


def as_arrays(found: object) -> list[np.ndarray]:
    """Returns an attention's output, or output and gradients, as float32."""

    def array(one: object) -> np.ndarray:
        if isinstance(one, torch.Tensor):
            return one.detach().float().cpu().numpy()
        return np.asarray(cast(jax.Array, one), np.float32)

    leaves = jax.tree.leaves(found, is_leaf=lambda one: isinstance(one, torch.Tensor))
    return [array(one) for one in leaves]
