"""The notebooks run from the first cell to the last, on a few steps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests import tiny

NOTEBOOKS = sorted((tiny.ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_notebook_runs(file: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", tiny.CHILD_FLAGS)
    monkeypatch.setenv("PYTHONPATH", f"{tiny.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(file, as_version=4)
    (setting,) = [cell for cell in notebook.cells if "STEPS = " in cell.source]
    setting.source = 'CONFIG, STEPS = "quickstart", 4'
    for cell in notebook.cells:
        cell.source = cell.source.replace("--test 20", "--test 4")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "error: " not in said
    answer = notebook.cells[-3].outputs[-1]["data"]["text/plain"]
    assert answer.startswith(("'", '"', "["))
    assert (tmp_path / "runs" / "notebook" / "hf" / "config.json").is_file()
    assert not [cell for cell in nbformat.read(file, as_version=4).cells if cell.get("outputs")], "kept without outputs"
