"""``python -m mole_jax.plan``: what a run takes on a machine that is not there, before it is rented."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mole_jax import cli
from mole_jax.errors import UserError, run_door
from mole_jax.files import local

FIGURES = (".png", ".svg", ".pdf")


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5e:4x4, v5p:4x4x4, v6e:8x8, h200:8, …")
    parser.add_argument("--preset", help="architecture to plan for where model.base is not here (vicuna-7b, …)")
    parser.add_argument(
        "--layers",
        type=_depths,
        default=(2, 4),
        metavar="A,B",
        help="compile these two depths and draw a straight line to the model's, or 'all' to compile it whole "
        "(slow, kept in the cache); default: 2,4",
    )
    parser.add_argument("--sweep", action="store_true", help="try other meshes, batch sizes and remat policies too")
    parser.add_argument("--limit", type=int, default=6, help="most candidates that --sweep compiles; default: 6")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--figure", type=_figure, metavar="FILE", help=f"draw memory and time ({', '.join(FIGURES)})")
    parser.add_argument(
        "--cache",
        type=Path,
        default="~/.cache/mole_jax/plan",
        metavar="DIR",
        help="what was compiled before, by program and compiler; default: ~/.cache/mole_jax/plan",
    )


def _depths(text: str) -> tuple[int, int] | None:
    if text == "all":
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or not 1 <= int(parts[0]) < int(parts[1]):
        raise UserError(f"--layers {text}: give two numbers of layers, the smaller first, such as 2,4; or all")
    return int(parts[0]), int(parts[1])


def _figure(text: str) -> Path:
    if (file := local(text)).suffix not in FIGURES:
        raise UserError(f"--figure {text}: name a file that ends in {', '.join(FIGURES)}")
    return file


def main() -> None:
    config, flags = cli.parse("plan", "Predict memory, cost and speed of a training step ahead of time.", extra=_flags)
    if flags.sweep and flags.layers is None:
        raise UserError("--layers all compiles one plan whole; leave it out with --sweep")
    if flags.limit < 1:
        raise UserError(f"--limit {flags.limit}: give at least 1 candidate")
    # Heavy imports wait until the command line is known to be right.
    from mole_jax.planning import report
    from mole_jax.planning.answer import answer

    found = answer(
        config,
        flags.topology,
        cache=flags.cache.expanduser(),
        preset=flags.preset,
        depths=flags.layers,
        limit=flags.limit if flags.sweep else None,
        say=lambda line: print(line, file=sys.stderr),
    )
    if flags.figure is not None:
        report.draw(found.best, flags.figure)
    print(json.dumps(found.to_json()) if flags.json else found.text())


if __name__ == "__main__":
    run_door(main)
