"""Compiled programs are kept on disk for the next start (JAX's persistent compilation cache)."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

FOLDER = "~/.cache/mole_jax/compiled"
MOST_BYTES = 20 << 30
"""Programs that were not used for longest are deleted beyond this."""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--no-compilation-cache`` to a command."""
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help=f"do not keep compiled programs for the next start (in {FOLDER} or JAX_COMPILATION_CACHE_DIR)",
    )


def keep(flags: argparse.Namespace) -> None:
    """Keeps the programs that this process compiles, small ones too, and takes those that are kept.

    Where the folder cannot be written, a warning says so and nothing is kept.
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
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if given is None:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def folder() -> str | None:
    """Returns where programs are kept; None: they are not."""
    import jax

    return jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None


def _processor() -> str:
    """Returns a name for this kind of processor: XLA compiles for its instructions, and a home may be shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        words = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        words = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
