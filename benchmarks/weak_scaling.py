"""``python -m benchmarks.weak_scaling``: a recipe on more and more chips, rows of a device kept, as table and figure.

One topology of each kind of chip is compiled, at two depths. More chips make `mesh.data` longer and nothing else, so
each device runs the same program; what it sends over `data` follows from the ring. ``--check NAME`` compiles another
one and says how far that is off. Needs `jax[tpu]` in an environment of its own; no hardware.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.pods import PAGE, ROOT, plan, recipe, write
from mole_jax import cli
from mole_jax.errors import UserError, run_door
from mole_jax.files import writing
from mole_jax.parallel.devices import CHIPS, GIB
from mole_jax.planning.predict import Prediction, predict
from mole_jax.planning.topology import devices_of, no_accelerator

BEGIN = "<!-- table: python -m benchmarks.weak_scaling -->"
FIGURE = ROOT / "docs" / "images" / "weak_scaling.svg"
SIZES = {
    "v5e:4x4": (8, 16, 32, 64, 128, 256),
    "v5p:2x2x4": (8, 16, 64, 256, 1024),
    "v6e:4x4": (8, 16, 32, 64, 128, 256),
}
"""By what is compiled, the chips of a slice; v5p's 1,024 are 8 x 8 x 16."""
SLICES = (2, 4)
"""Of the largest size."""
COLUMNS = ("chips", "slices", "mesh", "rows", "over fsdp", "over data", "between slices", "s/step", "one after another")


@dataclasses.dataclass(frozen=True)
class Point:
    """A step on so many chips; bytes are those that one device sends."""

    kind: str
    chips: int
    slices: int
    mesh: str
    rows: int
    inside: float
    """Over fsdp, expert and tensor."""
    across: float
    """Over data, by itself or with other axes, within a slice."""
    between: float
    """To other slices."""
    hidden: float
    """Seconds of a step if what is shorter hides behind what is longest."""
    exposed: float
    """Seconds of a step if nothing hides: computing, then links, then the network between slices."""


def point(plan: Prediction, chips: int, slices: int) -> Point:
    """Returns the step that `plan` becomes on `slices` slices of so many chips, by a longer `mesh.data`.

    An all-reduce over several slices is first summed within each, so that a device sends only its part of the sum to
    the other slices.

    Raises:
        UserError: the chips do not hold the plan's other axes, or what is sent over data is no all-reduce.
    """
    chip, inner = CHIPS[plan.device_kind], plan.devices // plan.mesh["data"]
    if chips % inner or plan.step_seconds is None or chip.links is None or chip.slices is None:
        raise UserError(
            f"{plan.topology} on {chips} chips: {inner} devices are one copy of the model, or no time is known"
        )
    mesh = plan.mesh | {"data": chips // inner}
    inside = across = between = 0.0
    for one in plan.exchanges:
        if "data" not in one.axes:
            inside += one.sent
            continue
        if one.kind != "all-reduce":
            raise UserError(f"{plan.topology}: {one.kind} over {' x '.join(one.axes)} is not scaled here")
        ring = math.prod(mesh[axis] for axis in one.axes)
        across += 2 * one.payload * (ring - 1) / ring
        between += 2 * one.payload * (slices - 1) / slices / ring
    times = plan.step_seconds, (inside + across) / chip.links, between / chip.slices
    return Point(
        kind=plan.topology.partition(":")[0],
        chips=chips * slices,
        slices=slices,
        mesh=f"data {mesh['data'] * slices}, fsdp {mesh['fsdp']}",
        rows=plan.rows * chips * slices // plan.devices,
        inside=inside,
        across=across,
        between=between,
        hidden=max(times),
        exposed=sum(times),
    )


def points(plan: Prediction, sizes: tuple[int, ...]) -> list[Point]:
    """Returns the steps on one slice of each size, and on several of the largest."""
    return [point(plan, size, 1) for size in sizes] + [point(plan, sizes[-1], slices) for slices in SLICES]


def table(found: dict[str, list[Point]]) -> str:
    """Returns the points as a Markdown table, bytes in MiB."""
    lines = [["chip", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for one in (each for line in found.values() for each in line):
        sent = [f"{size / 2**20:,.0f}" for size in (one.inside, one.across, one.between)]
        times = [f"{one.hidden:.3f}", f"{one.exposed:.3f}"]
        lines.append([one.kind, f"{one.chips:,}", str(one.slices), one.mesh, f"{one.rows:,}", *sent, *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steepest(found: dict[str, list[Point]]) -> str:
    """Returns by how much the slowest step of each kind is over the fastest, nothing hidden."""
    spans = {one[0].kind: max(p.exposed for p in one) / min(p.exposed for p in one) - 1 for one in found.values()}
    return ", ".join(f"{kind} {100 * span:.1f} %" for kind, span in spans.items())


def draw(found: dict[str, list[Point]], file: Path) -> None:
    """Draws seconds of a step against chips."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for line in found.values():
        chips = [one.chips for one in line]
        (drawn,) = axes.plot(chips, [one.exposed for one in line], marker="o", label=f"{line[0].kind}, nothing hidden")
        axes.plot(chips, [one.hidden for one in line], linestyle="--", color=drawn.get_color(), label=f"{line[0].kind}")
    axes.set(xscale="log", xlabel="chips", ylabel="seconds a step (predicted)", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize=8)
    with writing(file) as stream:
        figure.savefig(stream, format=file.suffix.removeprefix("."))


def main() -> None:
    parser = cli.Parser(prog="python -m benchmarks.weak_scaling", description=__doc__)
    parser.add_argument("--config", default="llava15_7b_mole", help="one of configs/")
    parser.add_argument("--topologies", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--check", metavar="NAME", help="compile this topology too, such as v5e:16x16, and compare")
    parser.add_argument("--write", action="store_true", help=f"put table and figure into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--dropout", type=float, help="instead of the recipe's own; 0 compiles several times faster")
    parser.add_argument("--cache", default="~/.cache/mole_jax/plan", metavar="DIR")
    flags = parser.parse_args()
    no_accelerator()
    cache = Path(flags.cache).expanduser()
    overrides = [] if flags.dropout is None else ["--adapter.dropout", str(flags.dropout)]
    found, plans = {}, {}
    for topology in flags.topologies:
        print(f"{flags.config} for {topology}", file=sys.stderr)
        plans[topology] = plan(flags.config, topology, cache, overrides)
        found[topology] = points(plans[topology], SIZES[topology])
    text = f"{table(found)}\n\njax {jax.__version__}; slowest over fastest, nothing hidden: {steepest(found)}."
    print(text)
    if flags.check:
        near = next(plan for name, plan in plans.items() if name.partition(":")[0] == flags.check.partition(":")[0])
        chips = len(devices_of(flags.check))
        config = recipe(flags.config, near.topology, overrides)
        rows = dataclasses.replace(config.train, batch_rows=near.rows * chips // near.devices)
        whole = predict(dataclasses.replace(config, train=rows), flags.check, cache=cache)
        guess, sent = point(near, chips, 1), sum(one.sent for one in whole.exchanges)
        print(
            f"{flags.check} compiled: {whole.cycles} cycles for {near.cycles}, {sent / GIB:.3f} GiB sent for "
            f"{(guess.inside + guess.across) / GIB:.3f}"
        )
    if flags.write:
        write(PAGE, text, BEGIN)
        draw(found, FIGURE)


if __name__ == "__main__":
    run_door(main)
