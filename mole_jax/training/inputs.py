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
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.run import latest_step

FILE = "inputs.json"
_SETTINGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_enable_x64",
    "jax_default_matmul_precision",
)
"""Settings of jax that change the numbers of a run: draws, types, and products."""


def look(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns hashes of held-out sets and tokenizer, and the settings of jax, as plain JSON values by what they are.

    Raises:
        UserError: a held-out set cannot be opened; told now and not after the training.
    """
    tasks = {
        f"held-out data of task {task.name}": fingerprint(RecordSource.open(task)) for task in config.evaluation.tasks
    }
    content = hashlib.sha256(tokenizer.source_files[0].read_bytes()).hexdigest()
    return {**tasks, "tokenizer": content[:16], **{name: getattr(jax.config, name, None) for name in _SETTINGS}}


def check(workdir: epath.Path, found: dict[str, Any]) -> str | None:
    """Compares with what the run in `workdir` was given, where one has begun (evaluated or saved).

    Returns:
        What to say of a run of an older version, of which that is not known; otherwise None.

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
    for name in before.keys() & found.keys():
        if before[name] != found[name]:
            raise UserError(
                f"{workdir}: holds a run whose {shortened(name)} was {_text(before[name])} and is {_text(found[name])} "
                "now; put it back to resume that run, or choose another --workdir"
            )
    return None


def write(workdir: epath.Path, found: dict[str, Any]) -> None:
    """Writes down what a run is given."""
    write_json(workdir / FILE, found)


def _text(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    return " and ".join(f"{name} of hash {one}" for name, one in value.items())
