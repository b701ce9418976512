"""``python -m mole_jax.report``: the page of a run, at any time of it."""

from __future__ import annotations

from mole_jax import cli
from mole_jax.errors import program, run_door
from mole_jax.terminal import escaped


def main() -> None:
    parser = cli.Parser(prog=program("report"), description="Write report.html of a run that ends, runs or was killed.")
    parser.add_argument("--workdir", required=True, help="folder of the run; gets report.html and plots/")
    flags = parser.parse_args()
    from mole_jax.evaluation import report
    from mole_jax.files import absolute

    workdir = absolute(flags.workdir)
    page = report.write_report(workdir)
    print(escaped(report.summary_table(workdir), keep="\n"))
    print(f"report: {page}")


if __name__ == "__main__":
    run_door(main)
