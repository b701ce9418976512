"""What we use of other libraries that they keep private. All of it is here, and `tests/test_compat.py` sees to that.

Each piece says what it is for, why nothing public does it, and in which version it was seen to work. Whoever raises a
version in pyproject.toml begins here. Libraries are imported where they are used: command lines are read before jax is.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """Returns every flag that a parser knows, such as ``--config``.

    Private: `ArgumentParser._actions` (Python 3.12). The public methods only add flags, or print them as text.
    """
    return [flag for action in parser._actions for flag in action.option_strings]


def none_required(parser: argparse.ArgumentParser) -> None:
    """Lets `parser` do without the flags that it requires.

    Private: ``ArgumentParser._actions``.
    """
    for action in parser._actions:
        action.required = False


def job_client() -> Any:
    """Returns this process's client of the coordinator: key-value store and barriers with a time limit.

    Private: `jax._src.distributed.global_state` (jax 0.12.0; orbax 0.12 takes it from there too).
    `jax.experimental.multihost_utils` has barriers, but they run on the devices and wait for ever.
    """
    from jax._src import distributed

    return distributed.global_state.client


def jax_flags() -> dict[str, Any]:
    """Returns the value of every flag of jax, by name.

    Private: `jax.config.values` (jax 0.12.0) has no underscore, but no documentation either. The public attributes of
    `jax.config` can be read, not listed.
    """
    import jax

    return dict(jax.config.values)


def on_tpu_vm() -> bool:
    """Returns whether this machine is a TPU VM that Google Cloud set up, as jax found when it was imported.

    Private: `jax._src.cloud_tpu_init.running_in_cloud_tpu_vm` (jax 0.12.0). Asking for devices would tell too, but a
    job of several processes has to be joined before that.
    """
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


def detected_process(timeout: int) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Returns (coordinator, processes, process, devices) as the launcher of this process tells them.

    Raises whatever jax raises when the launcher does not tell enough.

    Private: `jax._src.clusters.ClusterEnv` (jax 0.12.0). `jax.distributed.initialize` asks the same, but joins the job
    in the same call: a job of one process can do without it, and the roll is to be called before.
    """
    from jax._src import clusters

    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator_address=None,
        num_processes=None,
        process_id=None,
        local_device_ids=None,
        cluster_detection_method=None,
        initialization_timeout=timeout,
    )


def array_writer(write: Callable[[Any, Any], Awaitable[None]]) -> Any:
    """Returns an orbax type handler that leaves the writing of each array to ``await write(value, store)``.

    `store` is the array's open `tensorstore.TensorStore`; `value` is what was given to save, with `shape` and `dtype`.

    Private: `NumpyHandler._open_and_write` (orbax-checkpoint 0.12.8). Orbax's handlers want whole arrays in memory and
    write them all at once; a handler of its own would have to repeat their layout on disk.
    """
    import tensorstore as ts
    from orbax.checkpoint import type_handlers

    class Writer(type_handlers.NumpyHandler):
        async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
            await write(value, await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context))

    return Writer(deepcopy_host_arrays=False)


def splash_attention(
    length: int, heads: int, width: int, block: int, causal: bool, saved: str, interpret: bool
) -> Callable[[Any, Any, Any, Any], Any]:
    """Returns tokamax's splash attention as ``(q (H, S, C), k (K, S, C), v (K, S, C), segment_ids (S)) -> (H, S, C)``.

    Queries come scaled. Its output and the softmax's logarithm carry the name `saved` (`jax.ad_checkpoint`). The FLOPs
    that it declares are those of the blocks' products with the causal half taken off; other segments' are in them.

    Private: `tokamax._src.ops.experimental.tpu.splash_attention` (tokamax 0.0.17). The public
    `tokamax.dot_product_attention` takes no segment ids; jax's own splash kernel declares no FLOPs.
    """
    from jax.experimental import pallas as pl
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    pairs = length * length / 2 if causal else length * length
    product, array = int(2 * heads * pairs * width), 2 * heads * length * width

    def cost(products: int, arrays: int) -> Any:
        return pl.CostEstimate(
            flops=products * product, transcendentals=int(heads * pairs), bytes_accessed=arrays * array
        )

    config = splash.SplashConfig(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        # Forward: scores and values. Backward: scores again, and the gradients of values, weights, queries and keys.
        fwd_cost_estimate=cost(2, 4),
        bwd_cost_estimate=cost(5, 8),
        residual_checkpoint_name=saved,
        interpret=interpret,
    )
    mask = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
    kernel = splash.make_splash_mha(mask, config=config, q_seq_shards=1)
    return lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids))


@contextmanager
def for_absent_devices() -> Iterator[None]:
    """Lets tokamax's kernels be lowered for devices of a topology, where it would look at those of this machine."""
    if importlib.util.find_spec("tokamax") is None:
        yield
        return
    from tokamax.config import cross_compile

    _parsed_flags()
    with cross_compile(True):
        yield


def _parsed_flags() -> None:
    """Has absl's settings read, which tokamax asks for and only `absl.app.run` reads."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def tokamax_attention(kernel: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the forward and backward pass of one of tokamax's attentions on GPUs: ``triton`` or ``mosaic``.

    ``forward(q, k, v, k_start, causal) -> (y, residuals)`` and
    ``backward(q, k, v, k_start, causal, y, residuals, dy) -> (dq, dk, dv)`` with q (B, S, H, C), k and v (B, S, K, C)
    and `k_start` (B, 1, S): the first key that each query sees, or None.

    Private: `tokamax._src.ops.attention` (tokamax 0.0.17). The public `tokamax.dot_product_attention` takes masks of
    S x S alone, and its residuals cannot be kept by name over rematerialisation.
    """
    from tokamax._src.ops.attention import base

    _parsed_flags()
    if kernel == "triton":
        from tokamax._src.ops.attention.pallas_triton import PallasTritonFlashAttention as Attention
    else:
        from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention as Attention
    attention = Attention()
    gradients = attention.vjp
    assert gradients is not None

    def mask(k_start: Any, causal: bool) -> Any:
        return base.Mask(k_start=k_start, is_causal=causal)

    def forward(q: Any, k: Any, v: Any, k_start: Any, causal: bool) -> Any:
        return attention(q, k, v, mask=mask(k_start, causal), return_residuals=True)

    def backward(q: Any, k: Any, v: Any, k_start: Any, causal: bool, y: Any, residuals: Any, dy: Any) -> Any:
        bound = attention.bind(q, k, v, mask=mask(k_start, causal))
        settings = {name: value for name, value in bound.kwargs.items() if name != "return_residuals"}
        found = gradients(residuals, y, dy, *bound.args, **settings)
        return found["q"], found["k"], found["v"]

    return forward, backward
