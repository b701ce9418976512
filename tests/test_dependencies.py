"""What pyproject.toml declares is what the package imports, no more and no less."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable

import pytest

from mole_jax.data.containers.tfds import TfdsRecords
from mole_jax.errors import UserError
from tests.tiny import ROOT

BY_NAME = {
    "filelock": "lmms-eval imports what its newest version has no more",
    "gcsfs": "found by fsspec where a path begins with gs://",
    "nltk": "imported by its name (evaluation/caption_metrics.py)",
    "pycocoevalcap": "imported by its name (evaluation/caption_metrics.py)",
}
"""Packages that no import statement names, each with the reason."""
ONLY_TYPES = {"_typeshed"}


def normal(requirement: str) -> str:
    """Returns the name of a requirement as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~!; ]", requirement)[0]).lower()


def imported() -> set[str]:
    """Returns the top modules of other projects that the package imports, within functions too."""
    names: set[str] = set()
    for file in (ROOT / "mole_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    tops = {name.split(".")[0] for name in names}
    return tops - sys.stdlib_module_names - ONLY_TYPES - {"mole_jax"}


def declared() -> set[str]:
    """Returns the names of all requirements but those of developers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for name, extra in project["optional-dependencies"].items() if name != "dev" for one in extra]
    return {normal(one) for one in (*project["dependencies"], *extras)} - {"mole-jax"}


def packages_of(module: str, known: dict[str, list[str]]) -> Iterable[str]:
    """Returns the packages that bring a module; one that is not installed is taken to have its name."""
    return {normal(name) for name in known.get(module, [module])}


def test_every_import_is_declared_and_every_declared_package_imported():
    known, names = importlib.metadata.packages_distributions(), declared()
    by_module = {module: packages_of(module, dict(known)) for module in imported()}
    assert not {module for module, packages in by_module.items() if not names & set(packages)}, "not declared"
    assert not names - {one for packages in by_module.values() for one in packages} - BY_NAME.keys(), "not imported"


def test_a_set_without_tensorflow_datasets_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"^tfds:one:train: needs tensorflow-datasets: pip install 'mole-jax\[tfds\]'$"):
        TfdsRecords("tfds:one:train")
