"""``python -m mole_jax.study``: mixtures x adapters x seeds, and the report of what they say."""

from __future__ import annotations

from mole_jax import cli
from mole_jax.errors import program, run_door
from mole_jax.parallel import compiled
from mole_jax.parallel.launch import add_flags
from mole_jax.study.parts import part_of


def main() -> None:
    parser = cli.Parser(prog=program("study"), description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="Python file with get_study() -> Study")
    parser.add_argument("--workdir", required=True, help="folder of the runs and the report; the same call goes on")
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="run every N-th arm from the I-th (0 is the first); default: the slice of a TPU pod of several, each of "
        "which then runs its arms by itself",
    )
    parser.add_argument("--report", action="store_true", help="run nothing, make the report of what is done")
    compiled.add_flag(parser)
    add_flags(parser)
    flags = parser.parse_args()
    part, parts = part_of(flags.part)
    # After that, since what they import may look at the environment.
    from mole_jax.files import absolute
    from mole_jax.parallel import hosts
    from mole_jax.study import report, runner
    from mole_jax.study.config import Study

    study, workdir = cli.execute(flags.config, "get_study", Study), absolute(flags.workdir)
    compiled.keep(flags)
    with hosts.joined(flags, preemptible=True):
        if not flags.report:
            runner.run(study, workdir, part=part, parts=parts)
        if hosts.is_first():
            print(report.write(workdir))
            print(f"report: {workdir / 'report.md'}")


if __name__ == "__main__":
    run_door(main)
