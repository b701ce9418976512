"""Figures of runs whose domains have names that would be formulas, or broken ones."""

from __future__ import annotations

import numpy as np
import pytest

from mole_jax.evaluation import plots, routing_plots
from mole_jax.evaluation.routing_statistics import MODALITIES, Routed

NAMES = [r"$\frac{$", "$x$ and $y", r"50\$ off", "a_b^c", "%s {0}"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_and_no_formula(name):
    task = {"score": 0.5, "interval": [0.4, 0.6], "metric": name}
    drawn = [
        plots.losses([{"step": step, f"loss/{name}": 1.0 / step} for step in (1, 2, 3)]),
        plots.scores({name: task}, {name: task}),
        plots.experts([name, "b"], np.full((2, 2, 2), 0.5).tolist()),
    ]
    assert all(png.startswith(b"\x89PNG") for png in drawn)


def test_dollars_are_drawn():
    def drawn(name: str) -> bytes:
        return plots.experts([name], [[[0.5, 0.5]]])

    assert len({drawn("x"), drawn("$x$"), drawn("$ x $")}) == 3


def test_a_routing_report_of_such_a_domain_is_drawn():
    counts = np.ones((2, len(MODALITIES), 3, 2))
    routed = Routed(
        checkpoint="a run",
        step=0,
        router_gradient="none",
        domains=["$\\frac{$", "b"],
        tokens=counts,
        probabilities=counts,
        entropy=np.zeros((2, len(MODALITIES), 3)),
        losses=np.ones(2),
        answer_tokens=np.ones(2),
        skipped=[{}, {}],
        knock_out=np.zeros((2, 2)),
        knock_out_by_layer=np.zeros((3, 2, 2)),
    )
    for draw in (routing_plots.use, routing_plots.knock_out, routing_plots.knock_out_by_layer):
        assert draw(routed).startswith(b"\x89PNG")
