"""Folding low-rank adapters into the weights they stand beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.weights.leaf import Leaf, Leaves, as_leaf

_MLP = "decoder/layers/mlp/"
_ADAPTER = "/adapter/"


def adapter_paths(leaves: Leaves, path: str) -> tuple[str, str] | None:
    """Returns the paths of A and B beside the kernel at `path`, or None where there are none."""
    beside = path.removesuffix("kernel") + "adapter/"
    return (beside + "a", beside + "b") if path.endswith("/kernel") and beside + "a" in leaves else None


def merged_leaf(leaves: Leaves, path: str, adapter: AdapterConfig) -> np.ndarray | Leaf:
    """Returns the array at `path`; a kernel beside a plain LoRA becomes ``W + factor A B``.

    The sum is made in float32 and rounded once, to the type of W.
    """
    if adapter_paths(leaves, path) is None:
        return leaves[path]
    return dataclasses.replace(
        as_leaf(path, leaves[path]), read=lambda layer: merged_layer(leaves, path, adapter, layer)
    )


def merged_layer(leaves: Leaves, path: str, adapter: AdapterConfig, layer: int, expert: int = 0) -> np.ndarray:
    """Returns one layer (D_in, D_out) of the kernel at `path` with its LoRA, or one of its experts, in float32."""
    kernel = leaves[path][layer].astype(np.float32)
    beside = adapter_paths(leaves, path)
    if beside is None:
        return kernel
    block = slice(expert * adapter.rank, (expert + 1) * adapter.rank)
    a, b = leaves[beside[0]][layer][:, block], leaves[beside[1]][layer][block]
    return kernel + adapter.factor * (a.astype(np.float32) @ b.astype(np.float32))


def merged(leaves: Leaves, adapter: AdapterConfig, *, where: str) -> dict[str, np.ndarray | Leaf]:
    """Returns the leaves without adapters, each adapted kernel being ``W + factor A B``.

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
    leaves: Mapping[str, Leaf], adapter: AdapterConfig, expert: int, *, where: str
) -> tuple[dict[str, Leaf], AdapterConfig]:
    """Returns the model that sends every token to one expert: a plain LoRA of the same rank, and its settings.

    Raises:
        UserError: there are no experts, or not so many.
    """
    if adapter.kind != "mole":
        raise UserError(f"{where}: has no experts to choose from (adapter.kind {adapter.kind}); leave out --expert")
    if not 0 <= expert < adapter.experts:
        raise UserError(f"{where}: --expert {expert} is not one of its experts 0 to {adapter.experts - 1}")
    block = slice(expert * adapter.rank, (expert + 1) * adapter.rank)

    def chosen(path: str, leaf: Leaf) -> Leaf:
        if not (path.startswith(_MLP) and _ADAPTER in path):
            return leaf
        if path.endswith("/a"):
            return leaf.each(lambda a: a[:, block], (*leaf.shape[:2], adapter.rank))
        return leaf.each(lambda b: b[block], (leaf.shape[0], adapter.rank, leaf.shape[2]))

    kept = {path: chosen(path, leaf) for path, leaf in leaves.items() if not path.startswith(_MLP + "router/")}
    return kept, dataclasses.replace(adapter, kind="lora")
