"""What decides which programs a process compiles, beside the command line: to be the same on all of a job."""

from __future__ import annotations

import os
import re
from typing import Any

import jax

from mole_jax import compat

_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Files, messages, checks and devices are each process's own. What jax has new is compared until somebody puts it here.
_OWN = re.compile(
    r"address|cache|check|count|debug_(?!nans|infs)|_dir$|dump|frames|log|mtls|num_cpu_devices|pprint|report|timeout|"
    r"traceback|verbose|visible_devices|warn"
)


def program_settings() -> dict[str, Any]:
    """Returns JSON values of versions, flags of jax and variables of XLA that change programs, by name."""
    settings: dict[str, Any] = {"version of jax": jax.__version__}
    for name, value in compat.jax_flags().items():
        if not _OWN.search(name):
            settings[name] = value if value is None or isinstance(value, bool | int | str) else str(value)
    for name in _ENVIRONMENT:
        settings[name] = " ".join(word for word in os.environ.get(name, "").split() if not _OWN.search(word))
    return settings
