"""The shipped recipes: config files of the repository's `configs/`, which travel in the wheel."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

from mole_jax.config import Config
from mole_jax.errors import UserError, nearest

_HERE = Path(__file__).parent


def folder() -> Path:
    """Returns the folder of the recipes: in an installed package its own, in a checkout the one beside it."""
    return _shipped("configs")


def quickstart_base() -> Path:
    """Returns the folder of the small base that the quickstart trains."""
    return _shipped("assets/quickstart_base")


def names() -> dict[str, str]:
    """Returns every recipe with the first line of what it says of itself."""
    found = {}
    for file in sorted(folder().glob("*.py")):
        module = ast.parse(file.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in module.body):
            found[file.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found


def config(name: str) -> Config:
    """Returns the config of a recipe, for others that change a few of its settings, wherever they lie."""
    return runpy.run_path(str(folder() / f"{name}.py"))["get_config"]()


def path(config: str) -> str:
    """Returns the file of a config: `config` itself, or the recipe of that name where there is no such file."""
    file = folder() / f"{config}.py"
    return str(file) if not Path(config).exists() and Path(config).name == config and file.is_file() else config


def copy(name: str, to: Path) -> None:
    """Copies a recipe.

    Raises:
      UserError: there is no such recipe, or there is something at `to`.
    """
    if name not in names():
        raise UserError(f"configs: no recipe is called '{name}'{nearest(name, names())}; `mole-jax configs` lists them")
    if to.exists():
        raise UserError(f"configs: {to} is there already; name another with --output")
    try:
        to.write_bytes((folder() / f"{name}.py").read_bytes())
    except OSError as error:
        raise UserError(f"configs: {to} cannot be written ({error.strerror}); name another with --output") from None


def _shipped(name: str) -> Path:
    inside = _HERE / "shipped" / name
    return inside if inside.exists() else _HERE.parent / name
