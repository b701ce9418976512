"""What other libraries keep private is used in mole_jax/compat.py alone; the source is read, nothing of it is run."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("mole_jax", "configs", "benchmarks", "tests")
FILES = sorted(path for folder in OURS[:-1] for path in (ROOT / folder).rglob("*.py"))
COMPAT = ROOT / "mole_jax" / "compat.py"
PUBLIC = ("_replace", "_fields", "_asdict", "_make", "_exit", "_typeshed")
"""Documented in spite of the underscore: those of named tuples, `os._exit`, and the types of the type checkers."""
EXTRAS = ("lmms_eval", "nltk", "pycocoevalcap")
"""Packages that need not be installed; a class on top of one is not looked into where it is not."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def imported(tree: ast.AST) -> dict[str, str]:
    """Returns the dotted path of every name that is imported anywhere in a file."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                found[one.asname or one.name.partition(".")[0]] = one.name if one.asname else one.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return found


def defined(tree: ast.AST) -> set[str]:
    """Returns the names that a file gives to functions, classes, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def is_ours(path: str) -> bool:
    return path.partition(".")[0] in OURS


def private_of_others(source: str) -> list[tuple[int, str]]:
    """Returns line and text of what a file uses of other libraries' private names."""
    tree = ast.parse(source)
    imports, own = imported(tree), defined(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            used = of_import(node)
        elif isinstance(node, ast.Attribute):
            used = of_attribute(node, imports, own)
        elif isinstance(node, ast.Call):
            used = of_call(node, own)
        elif isinstance(node, ast.ClassDef):
            used = of_class(node, imports)
        else:
            continue
        found += [(node.lineno, text) for text in used]
    return found


def of_import(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    for path in (prefix + one.name for one in node.names):
        if not is_ours(path) and any(map(is_private, path.split("."))):
            yield path


def of_attribute(node: ast.Attribute, imports: dict[str, str], own: set[str]) -> Iterator[str]:
    """What a file defines itself, or asks of itself, is its own; of an imported module nothing is."""
    base = ast.unparse(node.value)
    whose = imports.get(base.partition(".")[0], "")
    mine = is_ours(whose) if whose else node.attr in own or base in ("self", "cls")
    if is_private(node.attr) and not mine:
        yield ast.unparse(node)


def of_call(node: ast.Call, own: set[str]) -> Iterator[str]:
    if ast.unparse(node.func) in ("getattr", "setattr", "hasattr") and isinstance(node.args[1], ast.Constant):
        name = str(node.args[1].value)
        if is_private(name) and name not in own:
            yield ast.unparse(node)


HOOKS = {
    "tensorflow_datasets.core.GeneratorBasedBuilder": ("_info", "_split_generators", "_generate_examples"),
}
"""Methods that a library documents as those to write, for all their underscore."""


def of_class(node: ast.ClassDef, imports: dict[str, str]) -> Iterator[str]:
    """Methods that override a private one of a foreign class."""
    methods = [one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    for base in map(ast.unparse, node.bases):
        first, _, rest = base.partition(".")
        if first in imports and not is_ours(imports[first]):
            path = imports[first] + (f".{rest}" if rest else "")
            foreign = looked_up(path)
            for name in filter(is_private, methods):
                if name not in HOOKS.get(path, ()) and inspect.getattr_static(foreign, name, None) is not None:
                    yield f"{node.name}.{name} overrides {base}'s"


def looked_up(path: str) -> object:
    """Returns the object of a dotted path in an installed package, None in an extra that is not installed."""
    words = path.split(".")
    for cut in range(len(words), 0, -1):
        try:
            value = importlib.import_module(".".join(words[:cut]))
        except ModuleNotFoundError:
            continue
        for word in words[cut:]:
            value = getattr(value, word)
        return value
    assert words[0] in EXTRAS, f"{words[0]} is not installed"
    return None


@pytest.mark.parametrize(
    "file", [file for file in FILES if file != COMPAT], ids=lambda file: str(file.relative_to(ROOT))
)
def test_no_private_name_of_another_library(file: Path):
    assert private_of_others(file.read_text()) == []


def test_compat_is_where_they_are():
    used = " ".join(text for _, text in private_of_others(COMPAT.read_text()))
    for name in ("jax._src.distributed", "jax._src.clusters", "jax._src.cloud_tpu_init", "parser._actions"):
        assert name in used
    assert "Writer._open_and_write overrides type_handlers.NumpyHandler's" in used


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from jax._src import core", 1),
        ("import jax._src.core", 1),
        ("from numpy import _core", 1),
        ("import jax\njax._src.core", 1),
        ("def f(parser):\n    return parser._actions", 1),
        ("def f(x):\n    return getattr(x, '_actions')", 1),
        ("import argparse\nclass P(argparse.ArgumentParser):\n    def _get_values(self): ...", 1),
        ("import argparse\nclass P(argparse.ArgumentParser):\n    def _values(self): ...", 0),
        ("import os\nos._exit(1)", 0),
        ("from __future__ import annotations\nfrom mole_jax.evaluation.plots import _png", 0),
        ("from mole_jax.evaluation import plots\nplots._png", 0),
        ("class A:\n    def _f(self): ...\n\ndef g(a):\n    return a._f()", 0),
        ("def f(state):\n    return state._replace(step=1)", 0),
    ],
)
def test_the_reader_of_the_source_finds_them(source: str, count: int):
    assert len(private_of_others(source)) == count
