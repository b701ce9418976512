"""``python -m mole_jax.configs``: the shipped recipes, listed, or one of them copied to be changed."""

from __future__ import annotations

from pathlib import Path

from mole_jax import recipes
from mole_jax.cli import Parser
from mole_jax.errors import UserError, program, run_door


def main() -> None:
    parser = Parser(prog=program("configs"), description="List the shipped recipes, or copy one to change it.")
    parser.add_argument("name", nargs="?", help="recipe to copy")
    parser.add_argument("--output", help="file to write; default: NAME.py in the current folder")
    flags = parser.parse_args()
    if flags.name is None:
        if flags.output is not None:
            raise UserError("configs: --output goes with the name of a recipe")
        for name, what in recipes.names().items():
            print(f"{name:<28} {what}")
        return
    to = Path(flags.output or f"{flags.name}.py")
    recipes.copy(flags.name, to)
    print(f"{to}: change it, then {program('train')} --config {to} --workdir RUN")


if __name__ == "__main__":
    run_door(main)
