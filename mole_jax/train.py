"""``python -m mole_jax.train``: finetune, pretrain the projector, or train plain LoRA, as the config says."""

from __future__ import annotations

import argparse
import sys

from mole_jax import cli
from mole_jax.errors import UserError, run_door
from mole_jax.parallel import compiled
from mole_jax.parallel.launch import add_flags
from mole_jax.terminal import escaped, warning


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", help="folder of the run (a path or gs://…); the same command run again resumes")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="open base and data, show shapes, memory and the first examples; train nothing and write nothing",
    )
    compiled.add_flag(parser)
    add_flags(parser)


def main() -> None:
    config, flags = cli.parse("train", "Finetune a LLaVA on a mixture of domains.", extra=_flags)
    if not flags.dry_run and flags.workdir is None:
        raise UserError("--workdir: is missing; name a folder for the run, or give --dry-run to look first")
    # Heavy imports wait until the command line is known to be right; data workers do without them.
    from mole_jax.parallel import hosts

    compiled.keep(flags)
    with hosts.joined(flags, preemptible=True):
        if flags.dry_run:
            from mole_jax.planning.dry_run import dry_run

            for line, notable in dry_run(config):
                print(warning(escaped(line, keep="\n"), sys.stdout) if notable else escaped(line, keep="\n"))
            return
        from mole_jax.files import absolute
        from mole_jax.training.loop import train

        train(config, absolute(str(flags.workdir)))


if __name__ == "__main__":
    run_door(main)
