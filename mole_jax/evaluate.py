"""``python -m mole_jax.evaluate``: held-out loss and scores of a checkpoint, task by task."""

from __future__ import annotations

import argparse

from mole_jax import cli
from mole_jax.errors import UserError, run_door


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's folder, a HF folder or a hub name")
    parser.add_argument("--workdir", required=True, help="folder for predictions, scores and the use of the experts")


def main() -> None:
    config, flags = cli.parse("evaluate", "Score a checkpoint on the tasks of a config.", extra=_flags)
    if not config.evaluation.tasks:
        raise UserError("config: evaluation.tasks is empty; add a TaskConfig(name, path)")
    from mole_jax.evaluation.checkpoint import evaluate_checkpoint
    from mole_jax.evaluation.report import score_table
    from mole_jax.weights.run import absolute

    print(score_table(evaluate_checkpoint(config, flags.checkpoint, absolute(flags.workdir))))


if __name__ == "__main__":
    run_door(main)
