"""The trackers that a config asks for."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable

from etils import epath

from mole_jax.config import Config, TrackConfig
from mole_jax.config_json import to_json
from mole_jax.errors import UserError
from mole_jax.files import read_json, write_json
from mole_jax.training.trackers.services import open_trackio, open_wandb
from mole_jax.training.trackers.tensorboard import TensorBoard
from mole_jax.training.trackers.tracker import Apart, Tracker

ID_FILE = "tracked_as.json"
"""Of a run's folder: what Weights & Biases and trackio know it by, so that it goes on there when resumed."""
SERVICES = ("wandb", "trackio")


def check_installed(config: TrackConfig) -> None:
    """Raises `UserError` if a library that `track.to` needs is not installed."""
    for name in SERVICES:
        if name in config.to and importlib.util.find_spec(name) is None:
            raise UserError(f"track.to has {name}, which is not installed; pip install 'mole-jax[track]'")


def open_trackers(config: Config, workdir: epath.Path, start: int, say: Callable[[str], None]) -> list[Tracker]:
    """Opens the trackers of `track.to` for a run that goes on after step `start`; each works in its own thread.

    `say` takes the line of one that fails, from any thread.
    """
    track, settings = config.track, to_json(config)
    run = _known_as(workdir, new=start == 0) if set(SERVICES) & set(track.to) else ""
    name = f"{config.name}-{run}"
    opens: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(workdir, start + 1 if start else 0),
        "wandb": lambda: open_wandb(workdir, track.project, name, run, settings),
        "trackio": lambda: open_trackio(track.project, name, settings),
    }
    return [Apart(tracker, opens[tracker], say) for tracker in track.to]


def _known_as(workdir: epath.Path, *, new: bool) -> str:
    """Returns the letters by which services know this run from others of its name; a `new` run gets new ones."""
    file = workdir / ID_FILE
    if new or not file.exists():
        write_json(file, {"id": secrets.token_hex(4)})
    return read_json(file, {"id": str}, remedy="delete it to have the run shown as a new one")["id"]
