"""What `pip install` brings: the wheel, installed alone, runs the quickstart in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.tiny import ROOT


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel_in_an_empty_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=ROOT)
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / "bin"
    run(scripts / "python", "-m", "pip", "install", "--no-deps", *(tmp_path / "dist").glob("*.whl"))
    # What it depends on is this environment's; the wheel's own folder comes first on the path.
    site = Path(run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    where = run(scripts / "python", "-c", "import mole_jax; print(mole_jax.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(site)
    assert "llava15_7b_mole" in run(scripts / "mole-jax", "configs", cwd=folder)
    output = run(scripts / "mole-jax", "quickstart", "--train.steps", "2", "--evaluation.generate", "False", cwd=folder)
    assert "$ mole-jax train --config quickstart" in output
    assert (folder / "runs" / "quickstart" / "mole" / "report.html").is_file()
