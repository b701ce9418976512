"""``python -m mole_jax.train``: finetune, pretrain the projector, or train plain LoRA, as the config says."""

from __future__ import annotations

import argparse

from mole_jax import cli
from mole_jax.errors import run_door
from mole_jax.parallel import compiled
from mole_jax.parallel.launch import add_flags


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", required=True, help="folder of the run (a path or gs://…); the same command run again resumes"
    )
    compiled.add_flag(parser)
    add_flags(parser)


def main() -> None:
    config, flags = cli.parse("train", "Finetune a LLaVA on a mixture of domains.", extra=_flags)
    # Heavy imports wait until the command line is known to be right; data workers do without them.
    from mole_jax.parallel import hosts

    compiled.keep(flags)
    with hosts.joined(flags, preemptible=True):
        from mole_jax.files import absolute
        from mole_jax.training.loop import train

        train(config, absolute(flags.workdir))


if __name__ == "__main__":
    run_door(main)
