"""``python -m mole_jax.evaluate``: held-out loss and scores of a checkpoint task by task, or two of them compared."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext

from mole_jax import cli
from mole_jax.config_check import check_tasks
from mole_jax.errors import program, run_door
from mole_jax.parallel import compiled
from mole_jax.parallel.launch import add_flags
from mole_jax.terminal import escaped, warning

COMPARE = "--compare"


def main() -> None:
    if COMPARE in sys.argv[1:] and not {"-h", "--help"} & set(sys.argv):
        _compare()
        return
    config, flags = cli.parse("evaluate", "Score a checkpoint on the tasks of a config.", extra=_flags)
    check_tasks(config)
    from mole_jax.parallel import hosts

    compiled.keep(flags)
    with hosts.joined(flags, preemptible=False):
        from mole_jax.data.left_out import of_task
        from mole_jax.evaluation.checkpoint import evaluate_checkpoint
        from mole_jax.evaluation.tables import aligned, score_rows
        from mole_jax.files import absolute
        from mole_jax.workdir import claimed

        workdir = absolute(flags.workdir)
        with claimed(workdir) if hosts.is_first() else nullcontext():
            result = evaluate_checkpoint(config, flags.checkpoint, workdir, base=flags.base)
        if hosts.is_first():
            print(aligned(score_rows(result)))
            for name, task in result["tasks"].items():
                if task.get("data"):
                    print(escaped(f"data: {task['data']}"), file=sys.stderr)
                if task.get("skipped"):
                    line = escaped(f"held-out loss: {(skipped := of_task(name, task))}")
                    print(warning(line, sys.stderr) if skipped.notable else line, file=sys.stderr)


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's folder, a HF folder, a hub name or an adapter")
    parser.add_argument("--workdir", required=True, help="folder for predictions, scores and the use of the experts")
    parser.add_argument("--base", help="model that an adapter stands on; default: the one that it names")
    _compare_flag(parser)
    compiled.add_flag(parser)
    add_flags(parser)


def _compare_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        COMPARE,
        nargs=2,
        metavar=("A", "B"),
        help="instead of evaluating, compare two evaluations on the same questions: for each its --workdir or its "
        "eval/step_N.json; needs no --config or --checkpoint, and --workdir only to write the table too",
    )


def _compare() -> None:
    parser = cli.Parser(prog=program("evaluate"), allow_abbrev=False)
    _compare_flag(parser)
    parser.add_argument("--workdir")
    flags = parser.parse_args()
    from mole_jax.evaluation.compare import compare
    from mole_jax.files import absolute
    from mole_jax.workdir import claimed

    found = compare(*flags.compare)
    print(escaped(found.text(), keep="\n"))
    if flags.workdir is not None:
        workdir = absolute(flags.workdir)
        with claimed(workdir):
            found.write(workdir)


if __name__ == "__main__":
    run_door(main)
