"""From a name such as ``v5e:4x4`` or ``h200:8`` to the devices of a machine that is not there.

The compilers come with the plugins: libtpu for TPUs, jax-cuda13-plugin for GPUs. Neither needs the hardware.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole_jax.errors import UserError, nearest

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
EXAMPLES = (
    "v5e:4x4",
    "v5e:8x8",
    "v5e:16x16",
    "v5p:2x2x2",
    "v5p:4x4x4",
    "v6e:4x4",
    "v6e:8x8",
    "h100:8",
    "h200:8",
    "l4:1",
)

TPU_PACKAGE = "libtpu"
CUDA_PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-nvvm")

# libtpu looks for the machine it is on; these make it not look, and let a second process load it.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# What XLA:GPU asks of a card, in its own words (stream_executor.GpuTargetConfigProto), from the vendor's data sheets.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
_ADA = """
gpu_device_info {{
  cuda_compute_capability {{ major: 8 minor: 9 }}
  core_count: 58 fpus_per_core: 128 clock_rate_ghz: 2.04
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 101376 shared_memory_per_core: 102400
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 50331648 memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
GPUS = {
    "l4": _ADA.format(kind="NVIDIA L4", bandwidth=300_000_000_000, memory=24_000_000_000),
    "h100": _HOPPER.format(kind="NVIDIA H100 80GB HBM3", bandwidth=3_350_000_000_000, memory=80_000_000_000),
    "h200": _HOPPER.format(kind="NVIDIA H200", bandwidth=4_800_000_000_000, memory=141_000_000_000),
}


def no_accelerator() -> None:
    """Keeps JAX from starting on TPUs or GPUs that this machine may have; call before anything asks for a device."""
    import jax

    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    jax.config.update("jax_platforms", "cpu")


def devices_of(name: str) -> list[Any]:
    """Returns the devices of a named topology, in the compiler's order.

    Raises:
        UserError: there is no such topology, or the package that knows it is not installed.
    """
    import jax
    from jax.experimental import topologies

    kind, _, size = name.partition(":")
    if kind in GPUS and size.isdigit() and int(size) >= 1:
        _need(CUDA_PACKAGES, name)
        hosts, each = (1, int(size)) if int(size) <= 8 else (int(size) // 8, 8)
        if hosts * each != int(size):
            raise UserError(f"--topology {name}: over 8 GPUs come in hosts of 8; choose {kind}:{hosts * 8}")
        arguments = {"target_config": GPUS[kind], "topology": f"1x{hosts}x{each}"}
        return topologies.get_topology_desc(platform="cuda", topology_name=kind, **arguments).devices
    # Without libtpu only the names below are known to be TPUs; with it, it is asked.
    if kind in GPUS or not re.fullmatch(r"\d+(x\d+){1,2}", size) or not (kind in TPUS or _installed(TPU_PACKAGE)):
        raise UserError(f"--topology {name}: no such topology{_known(name)}")
    _need((TPU_PACKAGE,), name)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(": ")[2] or str(error)
        raise UserError(f"--topology {name}: libtpu knows no such topology ({reason:.150}){_known(name)}") from None


def compiler_version(platform: str) -> str:
    """Returns the name and version of the package that compiles for "tpu", "gpu" or "cpu"."""
    package = {"tpu": TPU_PACKAGE, "gpu": CUDA_PACKAGES[1]}.get(platform, "jaxlib")
    return f"{package} {importlib.metadata.version(package)}"


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process compiles with this lock: two compilers at once take the memory of both."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "compiler.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _known(name: str) -> str:
    return nearest(name, EXAMPLES) or f"; such are {', '.join(EXAMPLES)}"


def _need(packages: tuple[str, ...], name: str) -> None:
    for package in packages:
        if not _installed(package):
            what = "'jax[tpu]'" if package == TPU_PACKAGE else " ".join(CUDA_PACKAGES)
            raise UserError(
                f"--topology {name}: needs {package} to compile for it, no hardware; in an environment of its own, "
                f"install {what} for jax {importlib.metadata.version('jax')}"
            )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
