"""``python -m mole_jax.doctor``: whether this machine computes what it should, and how fast its parts are."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from mole_jax import cli
from mole_jax.config import MeshConfig
from mole_jax.errors import run_door
from mole_jax.parallel.launch import add_flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look at a machine before training on it.", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a run's config, whose mesh is measured; default: data alone")
    parser.add_argument("--workdir", metavar="DIR", help="where a checkpoint is written and read (a path or gs://…)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_flags(parser)
    return parser


def main() -> None:
    flags = _parser().parse_args()
    mesh = cli.load_config(flags.config).mesh if flags.config else MeshConfig()
    # Heavy imports wait until the command line is known to be right.
    from mole_jax.parallel import hosts

    with hosts.joined(flags, preemptible=False):
        from mole_jax.diagnosis.examine import examine

        findings = examine(mesh, flags.workdir)
        if findings is not None:
            from mole_jax.diagnosis.finding import table

            rows = {"findings": [dataclasses.asdict(one) for one in findings]}
            print(json.dumps(rows) if flags.json else "\n".join(table(findings)), flush=True)
        wrong = hosts.first("doctor", lambda: any(one.state == "wrong" for one in findings or ()))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_door(main)
