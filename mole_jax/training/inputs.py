"""What a run was given besides its config and its training data, so that it is resumed on the same."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
from etils import epath

from mole_jax.config import Config
from mole_jax.data.fingerprint import fingerprint
from mole_jax.data.load import RecordSource
from mole_jax.errors import UserError
from mole_jax.files import read_json, write_json
from mole_jax.terminal import shortened
from mole_jax.tokenizer import BESIDE, JSON_FILE, Tokenizer
from mole_jax.weights.hf_config import GENERATION, PREPROCESSOR, PROCESSOR
from mole_jax.weights.run import latest_step
from mole_jax.weights.source import Source

FILE = "inputs.json"
_ABSENT = "absent"
_TEXT_FILES = (JSON_FILE, *BESIDE, PROCESSOR, PREPROCESSOR, GENERATION)
"""Files of the base that decide ids, pictures and what ends an answer, beside the tokenizer's own."""
_SETTINGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_enable_x64",
    "jax_default_matmul_precision",
)
"""Settings of jax that change the numbers of a run: draws, types, and products."""


def look(config: Config, tokenizer: Tokenizer, base: Source) -> dict[str, Any]:
    """Returns hashes of held-out sets and of files that decide ids and pictures, and the settings of jax.

    They are plain JSON values by what they are.

    Raises:
        UserError: a held-out set cannot be opened; told now and not after the training.
    """
    tasks = {
        f"held-out data of task {task.name}": fingerprint(RecordSource.open(task)) for task in config.evaluation.tasks
    }
    own, *beside = tokenizer.source_files
    there = {file.name: file for file in (*beside, *base.processor_files)}
    files = {name: _hash(there[name]) if name in there else _ABSENT for name in _TEXT_FILES}
    settings = {name: getattr(jax.config, name, None) for name in _SETTINGS}
    return {**tasks, "tokenizer": _hash(own), **files, **settings}


def check(workdir: epath.Path, found: dict[str, Any]) -> str | None:
    """Compares with what the run in `workdir` was given, where one has begun (evaluated or saved).

    Returns:
        What to say of a run of an older version, of which some of that is not known; otherwise None.

    Raises:
        UserError: something else; the message names the first.
    """
    if not ((workdir / "eval").exists() or latest_step(workdir) is not None):
        return None
    file = workdir / FILE
    if not file.exists():
        return (
            f"{file}: is not there (older versions wrote none); whether held-out data or tokenizer changed is not known"
        )
    before = read_json(file, remedy="delete it to resume without its check")
    for name, now in found.items():
        if before.get(name, now) != now:
            raise UserError(
                f"{workdir}: holds a run whose {shortened(name)} was {_text(before[name])} and is {_text(now)} now; "
                "put it back to resume that run, or choose another --workdir"
            )
    unknown = [name for name in _TEXT_FILES if name not in before]
    return (
        f"{file}: an older version wrote it; whether {' or '.join(unknown)} changed is not known" if unknown else None
    )


def write(workdir: epath.Path, found: dict[str, Any]) -> None:
    """Writes down what a run is given."""
    write_json(workdir / FILE, found)


def _hash(file: epath.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _text(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    return " and ".join(f"{name} of hash {one}" for name, one in value.items())
