"""Names of this package that docstrings and comments give in backticks exist."""

from __future__ import annotations

import ast
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
        found |= {target.id: [] for target in targets if isinstance(target, ast.Name)}
    return found


def exists(name: str) -> bool:
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:depth])
        file = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
        if file.exists():
            body = ast.parse(file.read_text()).body
            for part in parts[depth:]:
                if (inside := _names(body).get(part)) is None:
                    return False
                body = inside
            return True
    return False


def test_every_name_in_backticks_is_there():
    files = [
        file for folder in ("mole_jax", "tests", "configs", "benchmarks") for file in (ROOT / folder).rglob("*.py")
    ]
    given = {(file, name) for file in files for name in re.findall(r"`(mole_jax(?:\.\w+)+)`", file.read_text())}
    assert len(given) > 20
    assert not {(str(file), name) for file, name in given if name not in OFFERED and not exists(name)}


def test_a_name_that_has_gone_would_be_seen():
    assert exists("mole_jax.model.objective.Forward.evaluation_step")
    assert exists("mole_jax.data.batch.Batch")
    assert not exists("mole_jax.training.state.ModelSpec")
    assert not exists("mole_jax.model.objective.Forward.train_step")
