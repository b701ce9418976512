"""Weights & Biases, and trackio, which has the same functions. Both are imported when they are asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from PIL import Image

from mole_jax.files import is_remote

SENDING = 30.0
"""Seconds that Weights & Biases tries to begin a run, and in the end to send the rest of it, for which it would try for
ever by itself. What is left stays on disk, for `wandb sync`."""


class Service:
    """A `Tracker` of a module that has wandb's `Image` and `Table`, and of a run of it."""

    def __init__(self, module: Any, run: Any):
        self._module, self._run = module, run

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        self._run.log({name: self._module.Image(Image.open(io.BytesIO(png)))}, step=step)

    def answers(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        table = self._module.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({name: table}, step=step)

    def flush(self) -> None:
        """Does nothing: both send by themselves."""

    def close(self) -> None:
        self._run.finish()


def open_wandb(workdir: epath.Path, project: str, name: str, run: str, config: dict[str, Any]) -> Service:
    """Begins or continues the run of id `run` on Weights & Biases, or in its folder where ``WANDB_MODE`` is offline.

    Raises:
        PermissionError: no key is known. By itself wandb would ask for one, in the middle of the progress.
    """
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise PermissionError("no API key is known; call `wandb login` first, or set WANDB_MODE=offline")
    settings = wandb.Settings(silent=True, console="off", init_timeout=SENDING, finish_timeout=SENDING)
    opened = wandb.init(
        project=project,
        name=name,
        id=run,
        resume="allow",
        reinit="create_new",
        config=config,
        settings=settings,
        dir=None if is_remote(workdir) else str(workdir),
    )
    return Service(wandb, opened)


def open_trackio(project: str, name: str, config: dict[str, Any]) -> Service:
    """Begins or continues the run of that name in trackio's folder (``TRACKIO_DIR``), or where its settings say."""
    import trackio  # pyright: ignore[reportMissingImports]  not among what the project is tested with

    return Service(trackio, trackio.init(project=project, name=name, resume="allow", config=config, embed=False))
