"""Watches the routers while a run trains: who gets the tokens, and a warning when a layer collapses."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from mole_jax.adapters.usage import collapsed_layers, shares
from mole_jax.config import Config
from mole_jax.training.telemetry import MetricsWriter, record_events

EVENTS_FILE = "routing_events.jsonl"
WINDOW = 20
"""Steps looked at together."""
RECOVERED = 0.9
"""A collapsed layer has recovered when no expert gets more than this share; lower than `COLLAPSED`, so that a layer at
the edge does not warn again and again."""


class RoutingWatch:
    """Looks at the last `WINDOW` steps; for one process of a run.

    A layer that collapses is told once, and again if it recovered in between; both are also lines of
    `routing_events.jsonl` in the run's folder: step, event (collapsed, recovered), layer, expert, share.
    """

    def __init__(self, config: Config, workdir: epath.Path, say: Callable[[str], None]):
        """`say` takes a line for the screen."""
        self._config, self._file, self._say = config, workdir / EVENTS_FILE, say
        self._window: collections.deque[np.ndarray] = collections.deque(maxlen=WINDOW)
        self._collapsed: set[int] = set()

    def add(self, step: int, use: Float[np.ndarray, "domains L E"]) -> None:
        """Takes the tokens that each layer sent to each expert at `step`; warns where a layer has collapsed."""
        self._window.append(np.asarray(use, np.float64))
        if len(self._window) < WINDOW:
            return
        share = shares(self._use().sum(axis=0))
        events: list[dict[str, Any]] = []
        for layer in self._changed(share):
            expert = int(share[layer].argmax())
            event = "collapsed" if layer in self._collapsed else "recovered"
            events.append({"event": event, "layer": layer, "expert": expert, "share": float(share[layer, expert])})
            ending = f"; {self._advice()}" if event == "collapsed" else " and no more, it has recovered"
            takes = f"expert {expert} takes {100 * share[layer, expert]:.0f} % of the tokens"
            self._say(f"step {step}: layer {layer}: {takes} over the last {WINDOW} steps{ending}")
        if events:
            record_events(self._file, step, events)

    def draw(self, step: int, writer: MetricsWriter) -> None:
        """Shows in TensorBoard each domain's heat map of layer by expert: shares of the tokens of the last steps."""
        if not self._window:
            return
        from mole_jax.evaluation import plots  # matplotlib is slow to import: not before the first step

        use = self._use()
        names = [domain.name for domain in self._config.data.domains]
        present = [number for number in range(len(names)) if use[number].sum()]
        png = plots.experts([names[number] for number in present], shares(use[present]).tolist())
        writer.picture(step, "router/use", png)

    def _use(self) -> Float[np.ndarray, "domains L E"]:
        return np.sum(self._window, axis=0)

    def _changed(self, share: Float[np.ndarray, "L E"]) -> list[int]:
        """Returns the layers that have just collapsed or recovered, and remembers which are collapsed."""
        before = set(self._collapsed)
        now = {layer for layer, _ in collapsed_layers(share)}
        self._collapsed = now | {layer for layer in before if share[layer].max() > RECOVERED}
        return sorted(self._collapsed ^ before)

    def _advice(self) -> str:
        adapter, optimizer = self._config.adapter, self._config.optimizer
        weight = f"raise adapter.balance_weight ({adapter.balance_weight:g})"
        if adapter.balance_loss == "pooled":
            return f"set adapter.balance_loss to per_layer, since pooled cannot see one layer, or {weight}"
        rate = optimizer.router_learning_rate or optimizer.learning_rate
        return f"{weight} or lower optimizer.router_learning_rate ({rate:g})"
