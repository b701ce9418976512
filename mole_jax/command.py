"""``mole-jax NAME ...``: every command in one, each the same as ``python -m mole_jax.NAME``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping

from mole_jax.errors import PROGRAM, UserError, nearest, run_door

DOORS: Mapping[str, str] = {
    "quickstart": "make data and a small base, train on them, and leave a report: the first thing to run",
    "train": "finetune, pretrain the projector, or train plain LoRA, as the config says",
    "evaluate": "score a checkpoint on the tasks of a config",
    "generate": "answer about pictures, one question or a chat",
    "serve": "serve a checkpoint as OpenAI does",
    "convert": "bring weights from one format to another",
    "data": "look at a mixture before training",
    "plan": "predict memory and speed on a pod that is not there",
    "doctor": "look at a machine before training on it",
    "report": "write the page of a run, at any time of it",
    "routing": "report which experts a checkpoint chooses",
    "study": "measure whether domains conflict",
    "synthetic": "draw the quickstart's three domains",
    "configs": "list the shipped recipes, or copy one",
}
"""The commands, in the order in which a newcomer meets them."""


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"{PROGRAM} {importlib.metadata.version('mole-jax')}")
    elif name not in DOORS:
        raise UserError(f"unknown command '{name}'{nearest(name, DOORS)} (try {PROGRAM} --help)")
    else:
        del sys.argv[1]
        _module(name).main()


def _module(name: str):
    module = f"mole_jax.{name}"
    package = importlib.util.find_spec(module)
    inner = package is not None and package.submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if inner else module)


def _help() -> str:
    width = max(map(len, DOORS))
    doors = "\n".join(f"  {name:<{width}}  {what}" for name, what in DOORS.items())
    return (
        f"usage: {PROGRAM} COMMAND [options]\n\n{doors}\n\n"
        f"{PROGRAM} COMMAND --help tells everything of a command; {PROGRAM} --version the version."
    )


def run() -> None:
    """The installed script."""
    run_door(main)


if __name__ == "__main__":
    run()
