"""Folding plain LoRA into the weights it stands beside."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError


def merged(leaves: Mapping[str, np.ndarray], adapter: AdapterConfig, *, where: str) -> dict[str, np.ndarray]:
    """Returns the leaves without adapters, each adapted kernel being ``W + (alpha / rank) A B`` (in float32).

    Raises:
        UserError: the adapters are routed experts, which no single dense matrix equals.
    """
    if adapter.kind == "mole":
        raise UserError(
            f"{where}: holds a mixture of {adapter.experts} experts chosen token by token, which cannot be merged into "
            "one dense model; keep it as a run (evaluate takes it as it is)"
        )
    out = {}
    for path, leaf in leaves.items():
        if "/adapter/" in path:
            continue
        beside = path.removesuffix("kernel") + "adapter/"
        if path.endswith("/kernel") and beside + "a" in leaves:
            a, b = (leaves[beside + name].astype(np.float32) for name in "ab")
            leaf = leaf.astype(np.float32) + (adapter.alpha / adapter.rank) * (a @ b)
        out[path] = leaf
    return out
