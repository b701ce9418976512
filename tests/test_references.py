"""Names of this package that docstrings and comments give in backticks, or that are imported, exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
OFFERED = {"mole_jax.load", "mole_jax.generate"}
"""Given by the package when they are asked for (mole_jax/__init__.py)."""


def _names(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """What statements define, each with the statements inside of it."""
    found: dict[str, list[ast.stmt]] = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node.body
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.TypeAlias):
            targets = [node.name]
        several = [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
        found |= {target.id: [] for target in several if isinstance(target, ast.Name)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: [] for alias in node.names}
    return found


@functools.cache
def exists(name: str) -> bool:
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:depth])
        file = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
        if place.is_dir() and depth == len(parts):
            return True
        if file.exists():
            body = ast.parse(file.read_text()).body
            for part in parts[depth:]:
                if (inside := _names(body).get(part)) is None:
                    return False
                body = inside
            return True
    return False


def python_files() -> list[Path]:
    return [file for folder in ("mole_jax", "tests", "configs", "benchmarks") for file in (ROOT / folder).rglob("*.py")]


def imported(file: Path) -> set[str]:
    """The names of modules of this package and of what is in them that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("mole_jax", "benchmarks"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_what_is_imported_is_there():
    """Also in files that only another environment runs, such as those that need PyTorch."""
    given = {(file, name) for file in python_files() for name in imported(file)}
    assert len(given) > 1000
    assert not {(str(file), name) for file, name in given if name not in OFFERED and not exists(name)}


def test_every_name_in_backticks_is_there():
    files = python_files()
    given = {(file, name) for file in files for name in re.findall(r"`(mole_jax(?:\.\w+)+)`", file.read_text())}
    assert len(given) > 20
    assert not {(str(file), name) for file, name in given if name not in OFFERED and not exists(name)}


def test_a_name_that_has_gone_would_be_seen():
    assert exists("mole_jax.model.objective.Forward.evaluation_step")
    assert exists("mole_jax.data.batch.Batch")
    assert not exists("mole_jax.training.state.ModelSpec")
    assert not exists("mole_jax.model.objective.Forward.train_step")
