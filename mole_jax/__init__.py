"""LLaVA-MoLE in JAX: finetune multimodal LLMs on conflicting domains with a sparse mixture of LoRA experts."""

from __future__ import annotations

from typing import Any

__all__ = ["generate", "load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: data workers import this package and need neither model nor jax compilation.
    if name in __all__:
        from mole_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'mole_jax' has no attribute '{name}'")
