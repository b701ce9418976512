"""The figures of a routing report, each the bytes of a PNG."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mole_jax.adapters.usage import information_bound, mutual_information, shares
from mole_jax.colours import PALETTE
from mole_jax.evaluation.plots import _figure, _png, expert_maps, heat, largest
from mole_jax.evaluation.routing_statistics import MODALITIES, Routed

_DELTA = "added loss (nats per answer token)"


def use(routed: Routed) -> bytes:
    """Heat maps of layer by expert for each domain, of all tokens and of each modality; blank without a token."""
    counts = np.concatenate([routed.tokens.sum(axis=1, keepdims=True), routed.tokens], axis=1)
    return expert_maps(
        ["all tokens", *MODALITIES],
        list(routed.domains),
        np.swapaxes(shares(counts), 0, 1),
        title="Expert use by domain and modality",
        label="fraction of these tokens",
    )


def layers(routed: Routed) -> bytes:
    """Entropy and specialisation by layer, each as a part of the most that is possible."""
    curves = {
        "router entropy (of log E)": (routed.router_entropy, math.log(routed.tokens.shape[-1])),
        "domain specialisation": (mutual_information(routed.by_domain), information_bound(routed.by_domain)),
        "modality specialisation": (mutual_information(routed.by_modality), information_bound(routed.by_modality)),
    }
    figure, axes = _figure(7, 4)
    for (name, (values, most)), colour in zip(curves.items(), PALETTE, strict=False):
        if most:
            axes.plot(values / most, color=colour, linewidth=2, marker="o", markersize=4, label=name)
    axes.set(title="Routers by layer", xlabel="decoder layer", ylabel="part of the most possible", ylim=(0, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.has_data():
        axes.legend(frameon=False)
    return _png(figure)


def knock_out(routed: Routed) -> bytes:
    """Heat map of expert by domain: what is added to the loss without the expert."""
    experts, domains = routed.knock_out.shape
    figure = Figure(figsize=(2.4 + 1.2 * domains, 1.6 + 0.5 * experts), layout="constrained")
    axes = figure.subplots()
    image = heat(axes, routed.knock_out, largest(routed.knock_out), signed=True, numbers=True)
    axes.set(title="Knock-out of an expert in all layers", ylabel="expert", yticks=range(experts))
    axes.set_xticks(range(domains), routed.domains)
    figure.colorbar(image, ax=axes, label=_DELTA)
    return _png(figure)


def knock_out_by_layer(routed: Routed) -> bytes:
    """Heat maps of layer by expert for each domain: what is added to the loss without the expert in that layer."""
    assert routed.knock_out_by_layer is not None
    values = np.moveaxis(routed.knock_out_by_layer, -1, 0)[None]
    title = "Knock-out of an expert in one layer"
    return expert_maps([""], list(routed.domains), values, title=title, label=_DELTA, signed=True)
