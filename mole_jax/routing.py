"""``python -m mole_jax.routing``: where a checkpoint's routers send its tokens, and what each expert is worth."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from mole_jax import cli
from mole_jax.config_check import check_tasks
from mole_jax.errors import run_door
from mole_jax.parallel import compiled
from mole_jax.parallel.launch import add_flags
from mole_jax.terminal import escaped


def main() -> None:
    config, flags = cli.parse("routing", "Report a checkpoint's routing on the tasks of a config.", extra=_flags)
    check_tasks(config)
    from mole_jax.parallel import hosts

    compiled.keep(flags)
    with hosts.joined(flags, preemptible=False):
        from mole_jax.evaluation.routing import routing_of_checkpoint
        from mole_jax.evaluation.routing_report import text
        from mole_jax.files import absolute
        from mole_jax.workdir import claimed

        workdir, by_layer = absolute(flags.workdir), flags.knock_out == "layers"
        with claimed(workdir) if hosts.is_first() else nullcontext():
            routed = routing_of_checkpoint(config, flags.checkpoint, workdir, base=flags.base, by_layer=by_layer)
        if hosts.is_first():
            print(escaped(text(routed), keep="\n"))
            print(f"\nreport: {workdir / 'routing.md'}")


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's folder or a mixture's adapter file or folder")
    parser.add_argument("--workdir", required=True, help="folder for routing.json, routing.md and the figures")
    parser.add_argument("--base", help="model that an adapter stands on; default: the one that it names")
    parser.add_argument(
        "--knock-out",
        choices=("experts", "layers"),
        default="experts",
        help="experts: the loss without each expert, in all layers at once; layers: also in each layer by itself, "
        "which takes one more pass over the data for each of its experts",
    )
    compiled.add_flag(parser)
    add_flags(parser)


if __name__ == "__main__":
    run_door(main)
