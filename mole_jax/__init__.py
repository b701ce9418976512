"""LLaVA-MoLE in JAX: finetune multimodal LLMs on conflicting domains with a sparse mixture of LoRA experts."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__all__ = ["generate", "load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: data workers import this package and need neither model nor jax compilation.
    if name in __all__:
        from mole_jax import api

        return getattr(api, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("mole-jax")
    raise AttributeError(f"module 'mole_jax' has no attribute '{name}'")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the command mole_jax.generate would put it in the place of the function of the same name.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
