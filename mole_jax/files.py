"""Files and folders, local or remote (`etils.epath`): how they are named and read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from etils import epath

from mole_jax.errors import UserError


def absolute(name: str) -> epath.Path:
    """Returns a path that orbax takes: local ones made absolute, gs:// and the like as they are."""
    return epath.Path(name) if "://" in name else epath.Path(os.path.abspath(name))


def read_json(path: epath.Path | Path) -> dict[str, Any]:
    """Returns the JSON object in `path`.

    Raises:
        UserError: there is no such file, or it holds no JSON object; the message names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON ({error}); it may be cut off: put a whole one in its place, or remove it"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
