"""The drawing of the package's imports: rooms on floors, every arrow downwards, no circle."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mole_jax"

FLOORS = (
    ("plan", "train", "command", "quickstart", "doctor"),
    ("study", "planning", "diagnosis", "configs"),
    ("training", "evaluate", "generate", "serve", "routing", "convert", "report", "lmms"),
    ("evaluation", "api"),
    ("serving",),
    ("data",),
    ("weights",),
    ("families",),
    ("model",),
    ("adapters", "cli"),
    ("parallel", "config_check", "synthetic", "tokenizer", "workdir"),
    ("files", "config_json", "image_spec", "parameters", "recipes"),
    ("config", "compat"),
    ("errors",),
    ("terminal", "colours", "clip", "forms", "page", "prompts"),
)
"""The rooms (folders, or files on top of the package), the highest first. A room imports from lower floors alone."""

DRAWN = {
    "mole_jax/__init__.py": "offers what is in api.py when it is asked for, below which everything stands",
}
"""Files that no floor can have, each with the reason."""


def modules() -> dict[str, Path]:
    files = (ROOT / PACKAGE).rglob("*.py")
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, at its top or within its functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            # Its package too, if that has any code: importing the module runs it.
            package = known.get(node.module)
            if package is not None and (package.name != "__init__.py" or ast.parse(package.read_text()).body):
                names.add(node.module)
    return names & known.keys()


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.fixture(scope="module")
def drawing() -> dict[str, set[str]]:
    known = modules()
    left_out = {name for name, file in known.items() if file.relative_to(ROOT).as_posix() in DRAWN}
    return {name: imports(file, known) - left_out - {name} for name, file in known.items() if name not in left_out}


def test_every_room_has_a_floor_and_every_floor_its_rooms(drawing):
    assert {room(module) for module in drawing} == {name for floor in FLOORS for name in floor}


def test_no_arrow_runs_up(drawing):
    height = {name: -number for number, floor in enumerate(FLOORS) for name in floor}
    up = {
        f"{module} -> {other}"
        for module, others in drawing.items()
        for other in others
        if room(module) != room(other) and height[room(other)] >= height[room(module)]
    }
    assert not up, "\n".join(sorted(up))


def test_there_is_no_circle(drawing):
    try:
        graphlib.TopologicalSorter(drawing).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_circle_and_an_arrow_that_runs_up_would_be_seen(tmp_path):
    """The reader sees imports within functions, of modules from their package, and of names from a module."""
    file = tmp_path / "one.py"
    file.write_text(
        "import mole_jax.config\nfrom mole_jax import files\n"
        "def f():\n    from mole_jax.training.loop import train\n    return train\n"
    )
    assert imports(file, modules()) == {"mole_jax", "mole_jax.config", "mole_jax.files", "mole_jax.training.loop"}
