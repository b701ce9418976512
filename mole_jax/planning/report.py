"""A prediction as text, as a table of several, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mole_jax.files import writing
from mole_jax.parallel.devices import GIB
from mole_jax.planning.predict import KERNEL_SHARE, Memory, Prediction

PARTS = {
    "frozen": "frozen parameters",
    "trainable": "trainable parameters",
    "optimizer": "optimizer",
    "batch": "batch",
    "activations": "activations",
    "other_temporary": "other temporary",
    "code": "program",
}
COLOURS = ("#2a6fbb", "#4aa8b5", "#3a9d5d", "#d4a017", "#e07b39", "#c23b4e", "#7a6a58")
COLUMNS = ("mesh", "rows", "remat", "GiB", "of", "TFLOP", "sent GiB", "s/step", "tokens/s", "MFU")


def text(plan: Prediction, advice: Sequence[str]) -> str:
    """Returns the whole report of one prediction."""
    depth = (
        f"all {plan.layers} layers compiled"
        if len(plan.compiled_layers) == 1
        else f"{plan.compiled_layers[0]} and {plan.compiled_layers[1]} layers compiled, drawn on to {plan.layers}"
    )
    return "\n".join(
        [
            f"{plan.topology}: {plan.devices} x {plan.device_kind}, mesh {mesh_name(plan)}; predicted, nothing has run",
            f"{plan.rows} rows x {plan.length} tokens in {plan.accumulation} piece(s), remat {plan.remat}; {depth}",
            "",
            *_memory(plan.memory),
            "",
            *_step(plan),
            *_time(plan),
            "",
            "advice",
            *(f"  {number}. {line}" for number, line in enumerate(advice, 1)),
        ]
    )


def _memory(memory: Memory) -> Iterator[str]:
    yield "memory of one device"
    for name, label in PARTS.items():
        yield f"  {label:<22}{getattr(memory, name) / GIB:>9.3f} GiB"
    available = "" if memory.available is None else f" of {memory.available / GIB:.2f} GiB"
    verdict = {None: "", True: ": fits", False: ": DOES NOT FIT"}[memory.fits]
    yield f"  {'peak':<22}{memory.peak / GIB:>9.3f} GiB{available}{verdict}"


def _step(plan: Prediction) -> Iterator[str]:
    yield "a step on one device"
    yield f"  {plan.flops / 1e12:.2f} TFLOP, {plan.hardware_flops / 1e12:.2f} with what is recomputed"
    if plan.traffic:
        yield f"  {plan.traffic / GIB:.1f} GiB to and from memory"
    for one in plan.exchanges:
        yield (
            f"  {one.kind:<18} over {' x '.join(one.axes):<16} {one.count:>6} times, arrays of {size(one.payload):>9} "
            f"together, {size(one.sent):>9} sent"
        )
    if plan.cycles is not None:
        yield f"  {plan.cycles / 1e6:,.0f} million cycles by the compiler's estimate, collectives not counted"
    if plan.kernels.count:
        yield (
            f"  {plan.kernels.count:,} calls of kernels without an estimate: {plan.kernels.flops / 1e12:.2f} TFLOP, "
            f"{plan.kernel_seconds or 0:.3f} s at {100 * KERNEL_SHARE:.0f} % of the peak"
        )


def _time(plan: Prediction) -> Iterator[str]:
    if plan.seconds is not None and plan.step_seconds is not None and plan.tokens_per_second is not None:
        yield from ("", "prediction")
        yield (
            f"  {plan.step_seconds:.3f} s a step to compute, at least {plan.network_seconds or 0:.3f} s to send: "
            f"{plan.seconds:.3f} s if the shorter hides behind the longer"
        )
        yield (
            f"  {plan.tokens_per_second:,.0f} tokens/s together, MFU {100 * (plan.mfu or 0):.1f} %, "
            f"HFU {100 * (plan.hfu or 0):.1f} %"
        )
    elif plan.network_seconds is not None:
        yield ""
        yield f"at least {plan.network_seconds:.3f} s a step to send; this compiler estimates no time to compute"


def mesh_name(plan: Prediction) -> str:
    """Returns ``data 2, fsdp 8``, axes of one device left out."""
    return ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"


def size(number: float) -> str:
    """Returns a number of bytes with the unit that suits it."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def row(plan: Prediction) -> list[str]:
    """Returns the cells of one prediction under `COLUMNS`."""
    memory = plan.memory
    fits = {None: "", True: "", False: " over"}[memory.fits]

    def number(value: float | None, form: str) -> str:
        return "-" if value is None or memory.fits is False else format(value, form)

    return [
        mesh_name(plan),
        f"{plan.rows}" + (f" / {plan.accumulation}" if plan.accumulation > 1 else ""),
        plan.remat,
        f"{memory.peak / GIB:.1f}{fits}",
        "-" if memory.available is None else f"{memory.available / GIB:.1f}",
        f"{plan.flops / 1e12:.1f}",
        number(sum(one.sent for one in plan.exchanges) / GIB, ".1f"),
        number(plan.seconds, ".2f"),
        number(plan.tokens_per_second, ",.0f"),
        number(None if plan.mfu is None else 100 * plan.mfu, ".1f")
        + ("" if plan.mfu is None or not memory.fits else " %"),
    ]


def right_aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in rows
    )


def draw(plan: Prediction, file: Path) -> None:
    """Draws the memory of a device and the time of a step, as PNG, SVG or whatever the file's name ends in.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    below = 0.0
    for (name, label), colour in zip(PARTS.items(), COLOURS, strict=True):
        height = getattr(plan.memory, name) / GIB
        left.bar(["one device"], [height], bottom=below, color=colour, label=f"{label} {height:.2f}", width=0.5)
        below += height
    if plan.memory.available is not None:
        left.axhline(plan.memory.available / GIB, color="black", linestyle="--", linewidth=1)
    left.set(ylabel="GiB", title="Memory (dashed: what there is)")
    left.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    times = {"compute": plan.step_seconds, "send": plan.network_seconds}
    known = {name: value for name, value in times.items() if value is not None}
    right.barh(list(known), list(known.values()), color=COLOURS[: len(known)])
    right.set(xlabel="seconds", title="A step (predicted)" if known else "No time is estimated")
    figure.suptitle(f"{plan.topology}, {mesh_name(plan)}, {plan.rows} x {plan.length} tokens, remat {plan.remat}")
    with writing(file) as stream:
        figure.savefig(stream, format=file.suffix.removeprefix("."), dpi=120)
