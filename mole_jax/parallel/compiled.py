"""Compiled programs are kept on disk for the next start (JAX's persistent compilation cache)."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "~/.cache/mole_jax/compiled"
MOST_BYTES = 20 << 30
"""Programs that were not used for longest are deleted beyond this."""
_ASKED, _FOUND = (f"/jax/compilation_cache/{name}" for name in ("compile_requests_use_cache", "cache_hits"))
_events = Counter[str]()


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--no-compilation-cache`` to a command."""
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help=f"do not keep compiled programs for the next start (in {FOLDER} or JAX_COMPILATION_CACHE_DIR)",
    )


def keep(flags: argparse.Namespace) -> None:
    """Keeps the programs that this process compiles, small ones too, and takes those that are kept.

    Where the folder cannot be written, a warning says so and nothing is kept. Where it fails later, one line says so.
    """
    import jax  # after the command line is known to be right

    if flags.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = given or str(Path(FOLDER).expanduser() / _processor())
    if "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            print(f"warning: {folder}: {error.strerror}; compiled programs are not kept", file=sys.stderr)
            jax.config.update("jax_enable_compilation_cache", False)
            return
    jax.config.update("jax_compilation_cache_dir", folder)
    warnings.showwarning = _once(warnings.showwarning, folder)
    jax.monitoring.register_event_listener(lambda event, **_: _events.update([event]))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if given is None:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _once(show: Callable[..., None], folder: str) -> Callable[..., None]:
    """Returns a display of warnings that has one line for a folder that fails, where jax has some for each program."""
    failed = False

    def shown(message: Warning | str, *more: Any) -> None:
        nonlocal failed
        found = re.match(r"Error (?:read|writ)ing persistent compilation cache entry for '.*?': (.*)", str(message))
        if found is None:
            show(message, *more)
        elif not failed:
            failed = True
            remedy = "what fails there is compiled anew (free some space, or delete the folder)"
            print(f"warning: {folder}: {found[1]}; {remedy}", file=sys.stderr)

    return shown


def folder() -> str | None:
    """Returns where programs are kept; None: they are not."""
    import jax

    return jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None


def counts() -> dict[str, int]:
    """Returns how many programs this process has compiled and how many it has found; nothing where none are kept."""
    return {"compiled": _events[_ASKED] - _events[_FOUND], "found": _events[_FOUND]} if _events[_ASKED] else {}


def told() -> str:
    """Returns `counts` in words."""
    numbers = counts()
    return f"{numbers['compiled']} programs compiled, {numbers['found']} found" if numbers else "no programs are kept"


def _processor() -> str:
    """Returns a name for this kind of processor: XLA compiles for its instructions, and a home may be shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        words = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        words = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
