"""What README.md and docs/*.md name is there: files, functions and classes. The source is read, not imported."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("mole_jax", "configs", "benchmarks", "tests")
SOURCES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
THE_READERS = ("configs/mine.py", "CONFIG.py")
"""Files that the reader writes."""


def named_files(text: str) -> set[str]:
    """Returns the Python files that a page names; ``{a,b}/c.py`` is two."""
    found = set()
    for path in re.findall(r"[\w./{},-]*\w\.py\b", text):
        pieces = [piece.split(",") for piece in re.split(r"[{}]", path)]
        found |= (
            {"".join(one).lstrip("./") for one in itertools.product(*pieces)} if "{" in path else {path.lstrip("./")}
        )
    return found - set(THE_READERS)


def named_objects(text: str) -> set[str]:
    """Returns what stands in backticks as a call, or in the form of a class's name, alone or with its member."""
    ticks = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    calls = {found[1] for one in ticks if (found := re.match(r"([A-Za-z_][\w.]*)\(", one))}
    return calls | {one for one in ticks if re.fullmatch(r"(\w+\.)*[A-Z][a-z]+(?:[A-Z]?[a-z]+)*(\.\w+)?", one)}


def names_in_source() -> set[str]:
    """Returns every function, class and method of the tree, methods with and without their class."""
    found = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
                found |= {
                    f"{node.name}.{ast.unparse(one.target)}" for one in node.body if isinstance(one, ast.AnnAssign)
                }
    return found


def is_of_another_library(name: str) -> bool:
    """Tells whether a dotted name, such as ``jax.shard_map``, is an object of an installed package."""
    words = name.split(".")
    if len(words) == 1 or words[0] == "mole_jax":
        return False
    try:
        value = importlib.import_module(words[0])
        for word in words[1:]:
            value = getattr(value, word)
    except (ModuleNotFoundError, AttributeError):
        return False
    return True


@pytest.fixture(scope="module")
def known() -> set[str]:
    return names_in_source()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path):
    paths = [f"/{file.relative_to(ROOT)}" for file in SOURCES]
    absent = {name for name in named_files(page.read_text()) if not any(path.endswith(f"/{name}") for path in paths)}
    assert not absent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_object_that_a_page_names_is_there(page: Path, known: set[str]):
    names = {name.removeprefix("mole_jax.") for name in named_objects(page.read_text())}
    assert not {name for name in names if name not in known and not is_of_another_library(name)}


def test_what_follows_a_link_to_a_file_is_in_that_file():
    """docs/reading.md writes a name after the link to its file, or before it with "in" or "of" between."""
    text, wrong = " ".join((ROOT / "docs" / "reading.md").read_text().split()), []
    link = r"\[[^\]]+\]\(\.\./([\w/]+\.py)\)"
    after = re.findall(link + r":? `([\w.]+)`", text)
    before = [(file, name) for name, file in re.findall(r"`([\w.]+)` (?:in|of) " + link, text)]
    assert len(after) > 10
    assert len(before) > 3
    for file, name in after + before:
        source = (ROOT / file).read_text()
        if not all(re.search(rf"\b{word}\b", source) for word in name.split(".")):
            wrong.append(f"{name} in {file}")
    assert not wrong


def test_the_layout_names_every_file_and_room():
    layout = (ROOT / "docs" / "reading.md").read_text().partition("## Layout")[2].partition("##")[0]
    rooms = [f"{path.name}/" for path in (ROOT / "mole_jax").iterdir() if (path / "__init__.py").exists()]
    files = [path.name for path in (ROOT / "mole_jax").glob("*.py") if path.name != "__init__.py"]
    assert len(rooms) > 5
    words = re.findall(r"[\w.]+/?", layout)
    assert not {name for name in (*rooms, *files) if name not in words}


def test_messages_in_the_page_of_trouble_are_ones_that_we_print():
    """What stands between ellipses and numbers is part of a text in the source."""
    known = [
        node.value
        for file in SOURCES
        if file.is_relative_to(ROOT / "mole_jax")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    rows = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "trouble.md").read_text(), flags=re.MULTILINE)
    parts = [part.strip(" '(),%.:") for row in rows for part in re.split(r"…|\d[\d.,]*", row)]
    assert len(rows) > 15
    assert not [part for part in parts if len(part) > 9 and not any(part in text for text in known)]


def test_the_readers_of_the_pages_find_them():
    text = (
        "`Lost.thing`, `lost(a)` and `mole_jax.gone.away()` in lost.py, {a,b}/x.py; `tokens`, `v1`, `E r`, `TFDS_DIR`"
    )
    assert named_files(text) == {"lost.py", "a/x.py", "b/x.py"}
    assert named_objects(text) == {"Lost.thing", "lost", "mole_jax.gone.away"}
    assert is_of_another_library("ast.parse")
    assert not is_of_another_library("ast.perse")
