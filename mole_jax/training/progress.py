"""What a run shows on the screen: a live view on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import collections
import math
import os
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from mole_jax.colours import PALETTE
from mole_jax.terminal import escaped, warning
from mole_jax.training.telemetry import plain

SPEED_OVER = 600.0
"""Seconds of steps from which the time left is told."""
RECENT = 20
"""Recorded steps over which the speed is told."""
_DOMAIN_LETTERS = 8
_NAME_LETTERS = 20
_USE = "router/use/"


class Progress:
    """Steps, losses, use of experts and speed on stderr.

    On a terminal they stand in a view that is drawn again and again, with all lines above it. Elsewhere, and where
    ``NO_COLOR`` or ``CI`` is set, a plain line comes every `every_seconds` and at the last step. Use as a context
    manager: what ends a run leaves the terminal in order.

    `total` and `start` are steps. Without `show` nothing is said: of several processes one speaks. Of several runs at
    once each has its `prefix` before every line, and one has `show_steps`.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        every_seconds: float = 10.0,
        stream: TextIO | None = None,
        show: bool = True,
        show_steps: bool = True,
        prefix: str = "",
    ):
        self._show, self._given = show, stream
        self._show_steps, self._prefix = show and show_steps, prefix
        self._total, self._every, self._last = total, every_seconds, -math.inf
        self._view = View(self._stream, total, start) if self._show_steps and _is_lively(self._stream) else None

    @property
    def _stream(self) -> TextIO:
        """Where lines go; while a view is shown, even another run's, `sys.stderr` is what prints above it."""
        return self._given if self._given is not None else sys.stderr

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows that `step` is done, with the `metrics` that `MetricsWriter.write` takes."""
        if self._view is not None:
            self._view.update(step, metrics)
            return
        now = time.monotonic()
        if self._show_steps and (now - self._last >= self._every or step >= self._total):
            self._last = now
            print(
                f"{self._prefix}step {step}/{self._total}  {escaped(describe(metrics))}", file=self._stream, flush=True
            )

    def say(self, text: str, *, warn: bool = False) -> None:
        """Prints a line above the view; what it quotes from a file is escaped.

        With `warn` it is coloured where the stream is a terminal.
        """
        text = escaped(self._prefix + text)
        if self._view is not None:
            self._view.say(text, warn=warn)
        elif self._show:
            print(warning(text, self._stream) if warn else text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the view, which stays as it is; lines can still be said."""
        if self._view is not None:
            self._view.close()
            self._view = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_lively(stream: TextIO) -> bool:
    """Tells whether a view can be drawn again and again on `stream`, and no one has asked for plain text."""
    plain_asked = any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain_asked


class View:
    """The view of a run on a terminal: a bar, a line of numbers, and a row for each domain with its use of experts."""

    def __init__(self, stream: TextIO, total: int, start: int):
        self._console = Console(file=stream, highlight=False)
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None, complete_style=PALETTE[0], finished_style=PALETTE[0]),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=SPEED_OVER,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total, completed=start)
        self._seen: dict[str, Any] = {}
        self._recent: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=RECENT)
        self._live = Live(get_renderable=self._drawn, console=self._console, refresh_per_second=2)
        self._live.start(refresh=True)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        # A domain that this batch lacks keeps what was last known of it.
        known = {name: plain(value) for name, value in metrics.items() if value is not None}
        self._recent.append(known)
        self._seen |= known | _means(self._recent)
        self._bar.update(self._task, completed=step)

    def say(self, text: str, *, warn: bool) -> None:
        self._console.print(Text(text, style="yellow" if warn else ""), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def _drawn(self) -> RenderableType:
        numbers = Text("   ".join(_numbers(self._seen)) or "the first step is being compiled", style="dim")
        losses = {name: value for name, value in self._seen.items() if name.startswith("loss/")}
        if not losses:
            return Group(self._bar, numbers)
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("domain", max_width=_NAME_LETTERS, no_wrap=True)
        table.add_column("loss", justify="right")
        used = any(name.startswith(_USE) for name in self._seen)
        table.add_column("tokens by expert" if used else "", ratio=1)
        for name, loss in losses.items():
            domain = name.removeprefix("loss/")
            table.add_row(Text(escaped(domain)), f"{loss:.3f}", Shares(_shares(self._seen, domain)) if used else "")
        return Group(self._bar, numbers, table)


class Shares:
    """A bar as wide as its place, cut into the shares of the experts; each part has its number where it fits."""

    def __init__(self, shares: list[float]):
        self._shares = shares

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        drawn, at, reached = Text(no_wrap=True), 0, 0.0
        for expert, share in enumerate(self._shares):
            reached += share
            cells = round(options.max_width * reached) - at
            at += cells
            wordings = (f"{expert}: {share:.0%}", str(expert), "")
            label = next(one for one in wordings if len(one) <= max(0, cells - 1))
            drawn.append(label.center(cells), style=f"#ffffff on {PALETTE[expert % len(PALETTE)]}")
        yield drawn


def _means(recent: Collection[Mapping[str, Any]]) -> dict[str, float]:
    """The speed over recent steps: one step alone says little."""
    names = ("tokens_per_second", "mfu", "data_wait_fraction")
    seconds = sum(one.get("step_seconds", 0.0) for one in recent)
    known = [name for name in names if seconds and all(name in one for one in recent)]
    return {name: sum(one[name] * one["step_seconds"] for one in recent) / seconds for name in known}


def _shares(metrics: Mapping[str, Any], domain: str) -> list[float]:
    """The share of the domain's tokens that each expert got, averaged over layers."""
    start = f"{_USE}{domain}/expert"
    return [value for name, value in metrics.items() if name.startswith(start)]


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    """Loss, speed and memory in words, those that are known."""
    wordings = {
        "loss": "loss {:.3f}",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
        "data_wait_fraction": "data wait {:.0%}",
        "memory_gib": "memory {:.1f} GiB",
    }
    return [words.format(metrics[name]) for name, words in wordings.items() if metrics.get(name) is not None]


def describe(metrics: Mapping[str, Any]) -> str:
    """One short line: loss, the loss of each domain (its name cut short), tokens per second."""
    shown = []
    if metrics.get("loss") is not None:
        shown.append(f"loss {plain(metrics['loss']):.3f}")
    losses = {name.removeprefix("loss/"): plain(value) for name, value in metrics.items() if name.startswith("loss/")}
    present = [(name, value) for name, value in losses.items() if value is not None and math.isfinite(value)]
    if present:
        shown.append(f"({' '.join(f'{name[:_DOMAIN_LETTERS]} {value:.2f}' for name, value in present)})")
    if metrics.get("tokens_per_second") is not None:
        shown.append(f"{plain(metrics['tokens_per_second']):,.0f} tok/s")
    return " ".join(shown)
