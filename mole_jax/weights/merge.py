"""Folding low-rank adapters into the weights they stand beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError

_MLP = "decoder/layers/mlp/"
_ADAPTER = "/adapter/"


def adapter_paths(leaves: Mapping[str, np.ndarray], path: str) -> tuple[str, str] | None:
    """Returns the paths of A and B beside the kernel at `path`, or None where there are none."""
    beside = path.removesuffix("kernel") + "adapter/"
    return (beside + "a", beside + "b") if path.endswith("/kernel") and beside + "a" in leaves else None


def merged_leaf(leaves: Mapping[str, np.ndarray], path: str, adapter: AdapterConfig) -> np.ndarray:
    """Returns the array at `path`; a kernel beside a plain LoRA becomes ``W + (alpha / rank) A B``, in float32."""
    beside = adapter_paths(leaves, path)
    if beside is None:
        return leaves[path]
    a, b = (leaves[name].astype(np.float32) for name in beside)
    return leaves[path].astype(np.float32) + (adapter.alpha / adapter.rank) * (a @ b)


def merged_layer(
    leaves: Mapping[str, np.ndarray], path: str, adapter: AdapterConfig, layer: int, expert: int
) -> np.ndarray:
    """Returns one layer (D_in, D_out) of the kernel at `path` with one of its experts merged, in float32."""
    kernel = leaves[path][layer].astype(np.float32)
    beside = adapter_paths(leaves, path)
    if beside is None:
        return kernel
    block = slice(expert * adapter.rank, (expert + 1) * adapter.rank)
    a, b = leaves[beside[0]][layer][:, block], leaves[beside[1]][layer][block]
    return kernel + (adapter.alpha / adapter.rank) * (a.astype(np.float32) @ b.astype(np.float32))


def merged(leaves: Mapping[str, np.ndarray], adapter: AdapterConfig, *, where: str) -> dict[str, np.ndarray]:
    """Returns the leaves without adapters, each adapted kernel being ``W + (alpha / rank) A B`` (in float32).

    Raises:
        UserError: the adapters are routed experts, which no single dense matrix equals.
    """
    if adapter.kind == "mole":
        raise UserError(
            f"{where}: holds a mixture of {adapter.experts} experts chosen token by token, which cannot be merged into "
            "one dense model; keep the mixture, or fold one expert with --expert"
        )
    return {path: merged_leaf(leaves, path, adapter) for path in leaves if _ADAPTER not in path}


def single_expert(
    leaves: Mapping[str, np.ndarray], adapter: AdapterConfig, expert: int, *, where: str
) -> tuple[dict[str, np.ndarray], AdapterConfig]:
    """Returns the model that sends every token to one expert: a plain LoRA of the same rank, and its settings.

    Raises:
        UserError: there are no experts, or not so many.
    """
    if adapter.kind != "mole":
        raise UserError(f"{where}: has no experts to choose from (adapter.kind {adapter.kind}); leave out --expert")
    if not 0 <= expert < adapter.experts:
        raise UserError(f"{where}: --expert {expert} is not one of its experts 0 to {adapter.experts - 1}")
    block = slice(expert * adapter.rank, (expert + 1) * adapter.rank)

    def chosen(path: str, leaf: np.ndarray) -> np.ndarray:
        if not (path.startswith(_MLP) and _ADAPTER in path):
            return leaf
        return leaf[..., block] if path.endswith("/a") else leaf[..., block, :]

    kept = {path: chosen(path, leaf) for path, leaf in leaves.items() if not path.startswith(_MLP + "router/")}
    return kept, dataclasses.replace(adapter, kind="lora")
