"""``python -m mole_jax.quickstart``: the main job in small, from nothing to a report, in the current folder.

It runs the commands that one would type, and shows them.
"""

from __future__ import annotations

import subprocess
import sys

from mole_jax import recipes
from mole_jax.cli import Parser
from mole_jax.errors import program, run_door
from mole_jax.files import absolute

FOLDER = "runs/quickstart"
"""Where all of it goes; the recipe names it too."""


def main() -> None:
    parser = Parser(
        prog=program("quickstart"),
        description=f"Draw three domains, write a small base, train on both and leave {FOLDER}/mole/report.html; "
        "again: go on. Other options are those of train.",
        allow_abbrev=False,
    )
    _, rest = parser.parse_known_args()
    _run("synthetic", "--output", f"{FOLDER}/data", "--seed", "0", "--train", "1500", "--test", "100")
    if not (absolute(f"{FOLDER}/base") / "checkpoints" / "0").exists():
        _run("convert", "--input", str(recipes.quickstart_base()), "--output", f"{FOLDER}/base", "--to", "run")
    _run("train", "--config", "quickstart", "--workdir", f"{FOLDER}/mole", *rest)


def _run(door: str, *arguments: str) -> None:
    print("$", program(door), *arguments, flush=True)
    if status := subprocess.run([sys.executable, "-m", f"mole_jax.{door}", *arguments]).returncode:
        sys.exit(status)


if __name__ == "__main__":
    run_door(main)
