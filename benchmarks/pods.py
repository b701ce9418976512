"""``python -m benchmarks.pods``: the recipes planned for TPU pods and eight GPUs: the table of docs/pods.md.

Needs `jax[tpu]` and, for the GPUs, the CUDA plugin, in an environment of its own; no hardware. Two depths of each are
compiled, which takes minutes, and cached; ``--whole CONFIG TOPOLOGY`` compiles one of them in all its layers and states
how far the straight line was off.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from mole_jax import cli
from mole_jax.config import Config
from mole_jax.errors import UserError, run_door
from mole_jax.parallel.devices import GIB
from mole_jax.planning.compile import architecture_of
from mole_jax.planning.predict import DEPTHS, Prediction, predict
from mole_jax.planning.report import COLUMNS, row
from mole_jax.planning.topology import no_accelerator

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- table: python -m benchmarks.pods -->", "<!-- end of table -->"
CONFIGS = ("llava15_7b_mole", "llava15_13b_mole")
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4", "h200:8")
OWN: Mapping[str, tuple[str, ...]] = {"v5p:2x2x4": ("--train.accumulation", "1")}
"""What a topology has in place of the recipes' setting: where the memory is there, the rows at once are faster."""


def recipe(config: str, topology: str, overrides: Sequence[str]) -> Config:
    """Returns one of the shipped recipes as it is planned for a topology."""
    return cli.load_config(str(ROOT / "configs" / f"{config}.py"), [*OWN.get(topology, ()), *overrides])


def plan(
    config: str, topology: str, cache: Path, overrides: Sequence[str], depths: Sequence[int] | None = DEPTHS
) -> Prediction:
    """Predicts one of the shipped recipes."""
    return predict(recipe(config, topology, overrides), topology, cache=cache, depths=depths)


def table(plans: dict[tuple[str, str], Prediction]) -> str:
    """Returns the predictions as a Markdown table."""
    head = ["recipe", "topology", *COLUMNS]
    lines = [head, ["---"] * len(head)]
    lines += [[config, topology, *row(one)] for (config, topology), one in plans.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def off(line: Prediction, whole: Prediction) -> str:
    """Returns by how much the straight line through two depths missed a whole compile."""
    pairs = {"peak memory": (line.memory.peak, whole.memory.peak), "cycles": (line.cycles, whole.cycles)}
    pairs["bytes sent"] = tuple(sum(e.sent for e in one.exchanges) for one in (line, whole))
    found = [f"{name} {100 * (a / b - 1):+.2f} %" for name, (a, b) in pairs.items() if a and b]
    return f"{whole.topology}, {whole.layers} layers whole: the line through {line.compiled_layers} was off by " + (
        f"{', '.join(found)} (peak {whole.memory.peak / GIB:.2f} GiB; compiled in {whole.compile_seconds:.0f} s)"
    )


def write(page: Path, text: str, begin: str = BEGIN) -> None:
    """Puts `text` between the marks of a page."""
    before, mark, rest = page.read_text().partition(begin)
    after = rest.partition(END)
    if not mark or not after[1]:
        raise UserError(f"{page}: lacks the marks {begin} and {END} that the table stands between")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{END}{after[2]}")


def main() -> None:
    parser = cli.Parser(prog="python -m benchmarks.pods", description=__doc__)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, metavar="NAME")
    parser.add_argument("--whole", nargs=2, metavar=("CONFIG", "TOPOLOGY"), help="compile one of all layers, compare")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--dropout", type=float, help="instead of the recipes' own; 0 compiles several times faster")
    parser.add_argument("--cache", default="~/.cache/mole_jax/plan", metavar="DIR")
    flags = parser.parse_args()
    no_accelerator()
    cache = Path(flags.cache).expanduser()
    overrides = [] if flags.dropout is None else ["--adapter.dropout", str(flags.dropout)]
    if flags.whole:
        config, topology = flags.whole
        print(off(plan(config, topology, cache, overrides), plan(config, topology, cache, overrides, None)))
        return
    plans = {}
    for config in flags.configs:
        layers = architecture_of(cli.load_config(str(ROOT / "configs" / f"{config}.py"))).decoder.layers
        for topology in flags.topologies:
            print(f"{config} ({layers} layers) for {topology}", file=sys.stderr)
            plans[config, topology] = plan(config, topology, cache, overrides)
    dropout = "" if flags.dropout is None else f", dropout {flags.dropout}"
    text = f"{table(plans)}\n\njax {jax.__version__}, {DEPTHS[0]} and {DEPTHS[1]} layers compiled{dropout}."
    print(text)
    if flags.write:
        write(PAGE, text)


if __name__ == "__main__":
    run_door(main)
