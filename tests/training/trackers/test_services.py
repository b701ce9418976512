"""Weights & Biases (offline) and trackio (on this machine), the real libraries: what is sent is what they keep."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from PIL import Image

from mole_jax.config import TrackConfig
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.training.trackers import open as opening
from mole_jax.training.trackers.open import check_installed, open_trackers
from tests import tiny

pytest.importorskip("wandb", reason="needs the extra track")
TRACKERS = ("wandb", *(["trackio"] if importlib.util.find_spec("trackio") else []))

SHOW = """
import sys
from pathlib import Path
from mole_jax.files import absolute
from mole_jax.training.trackers.open import open_trackers
from tests import tiny
folder = Path(sys.argv[1])
config = tiny.config(folder, track={"to": tuple(sys.argv[2:])})
for start in (0, 1):
    for tracker in open_trackers(config, absolute(folder), start, print):
        tracker.numbers(start + 1, {"loss": 2.5})
        tracker.picture(start + 1, "router/use", (folder / "use.png").read_bytes())
        tracker.answers(start + 1, "answers/general", [{"question": "How many?", "answer": "two"}])
        tracker.flush()
        tracker.close()
"""
"""Shows one step, and resumes to show another."""


def test_both_keep_what_they_are_shown_and_a_resumed_run_goes_on(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    (tmp_path / "use.png").write_bytes(png.getvalue())
    environment = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", SHOW, str(tmp_path), *TRACKERS]
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing more" not in done.stdout
    name = f"tiny-{json.loads((tmp_path / opening.ID_FILE).read_text())['id']}"
    offline = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert {one.name.rpartition("-")[2] for one in offline} == {name.rpartition("-")[2]}, "one run, begun and gone on"
    log = next(offline[0].glob("*.wandb")).read_bytes()
    assert b"loss" in log
    assert b"straight_through" in log, "the config"
    (table,) = offline[0].rglob("answers/*.table.json")
    assert json.loads(table.read_text()) == {"columns": ["question", "answer"], "data": [["How many?", "two"]]}
    assert list(offline[0].rglob("router/*.png"))
    if "trackio" not in TRACKERS:
        pytest.skip("Weights & Biases was tried; trackio is not installed (extra track, which wants Pillow below 13)")
    kept = sqlite3.connect(tmp_path / "trackio" / "mole-jax.db").execute("select run_name, step, metrics from metrics")
    rows = [(run, step, json.loads(metrics)) for run, step, metrics in kept]
    assert {run for run, _, _ in rows} == {name}
    assert [step for _, step, metrics in rows if metrics.get("loss") == 2.5] == [1, 2]
    assert next(one for *_, one in rows if "answers/general" in one)["answers/general"]["_value"] == [
        {"question": "How many?", "answer": "two"}
    ]


def test_without_a_key_wandb_asks_nothing_and_is_left(tmp_path):
    said = []
    config = tiny.config(tmp_path, track={"to": ("wandb",)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "online")
        patch.setenv("WANDB_API_KEY", "")
        patch.setenv("NETRC", str(tmp_path / "none"))
        (tracker,) = open_trackers(config, absolute(tmp_path), 0, said.append)
        tracker.close()
    assert len(said) == 1
    assert "no API key is known; call `wandb login` first, or set WANDB_MODE=offline" in said[0]


def test_a_library_that_is_missing_is_told_before_anything_begins(monkeypatch):
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    check_installed(TrackConfig())
    with pytest.raises(
        UserError, match=r"track\.to has trackio, which is not installed; pip install 'mole-jax\[track\]'"
    ):
        check_installed(TrackConfig(to=("tensorboard", "trackio")))


def test_a_new_run_has_a_name_of_its_own(tmp_path):
    names = [opening._known_as(absolute(tmp_path), new=new) for new in (True, False, True)]
    assert names[0] == names[1] != names[2]
