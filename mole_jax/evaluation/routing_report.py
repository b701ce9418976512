"""The routing report: from what was measured to JSON, tables and figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from etils import epath

from mole_jax.adapters.usage import (
    COLLAPSED,
    DEAD,
    collapsed_layers,
    dead_experts,
    information_bound,
    mutual_information,
    shares,
)
from mole_jax.evaluation import routing_plots
from mole_jax.evaluation.routing_statistics import MODALITIES, Routed
from mole_jax.evaluation.tables import ABSENT, Rows, aligned, markdown
from mole_jax.files import made, write_bytes, write_json, write_text

RESULT = "routing.json"


def write_routing(workdir: epath.Path, routed: Routed) -> None:
    """Writes the figures, routing.md and, last, since its being there means that all is, routing.json."""
    made(workdir)
    figures = {"use": routing_plots.use(routed), "layers": routing_plots.layers(routed)}
    figures["knock_out"] = routing_plots.knock_out(routed)
    if routed.knock_out_by_layer is not None:
        figures["knock_out_by_layer"] = routing_plots.knock_out_by_layer(routed)
    for name, png in figures.items():
        write_bytes(workdir / f"{name}.png", png)
    write_text(workdir / "routing.md", page(routed, figures))
    write_json(workdir / RESULT, as_json(routed))


def as_json(routed: Routed) -> dict[str, Any]:
    """Returns all that was measured and found, as plain JSON values; docs/routing.md says what they are."""
    return {
        "checkpoint": routed.checkpoint,
        "step": routed.step,
        "router_gradient": routed.router_gradient,
        "domains": list(routed.domains),
        "modalities": list(MODALITIES),
        "held_out": {
            name: {"loss": float(loss), "answer_tokens": int(tokens), "skipped": dict(skipped)}
            for name, loss, tokens, skipped in zip(
                routed.domains, routed.losses, routed.answer_tokens, routed.skipped, strict=True
            )
        },
        "tokens": routed.tokens.astype(np.int64).tolist(),
        "probability_sums": routed.probabilities.tolist(),
        "entropy_sums": routed.entropy.tolist(),
        "layers": layer_statistics(routed),
        "dead": [{"layer": layer, "expert": expert} for layer, expert in dead_experts(routed.share)],
        "collapsed": [{"layer": layer, "expert": expert} for layer, expert in collapsed_layers(routed.share)],
        "thresholds": {"dead": DEAD, "collapsed": COLLAPSED},
        "knock_out": routed.knock_out.tolist(),
        "knock_out_by_layer": None if routed.knock_out_by_layer is None else routed.knock_out_by_layer.tolist(),
    }


def layer_statistics(routed: Routed) -> list[dict[str, Any]]:
    """Returns for each layer its shares, entropy and specialisation; a part of a bound that is 0 is None."""
    experts = routed.tokens.shape[-1]
    found: dict[str, tuple[np.ndarray, float]] = {"entropy": (routed.router_entropy, math.log(experts))}
    for name, counts in (("domain", routed.by_domain), ("modality", routed.by_modality)):
        found[f"{name}_information"] = mutual_information(counts), information_bound(counts)
    return [
        {"layer": layer, "share": share.tolist()}
        | {name: float(values[layer]) for name, (values, _) in found.items()}
        | {f"{name}_part": float(values[layer]) / most if most else None for name, (values, most) in found.items()}
        for layer, share in enumerate(routed.share)
    ]


def text(routed: Routed) -> str:
    """Returns the report for a terminal."""
    parts = [aligned(layer_rows(routed)), aligned(knock_out_rows(routed)), *findings(routed)]
    return "\n\n".join(parts)


def page(routed: Routed, figures: dict[str, bytes]) -> str:
    """Returns the report in Markdown, with the figures that lie beside it."""
    heading = f"# Routing of `{routed.checkpoint}`, step {routed.step}"
    parts = [
        heading,
        "\n".join(f"- {line}" for line in findings(routed)),
        "## Layers",
        markdown(layer_rows(routed)),
        _LAYER_NOTE,
        "![](layers.png)",
        "## Where the tokens go",
        markdown(use_rows(routed)),
        "Share of the tokens that each expert gets, the mean over layers.",
        "![](use.png)",
        "## Knock-out",
        markdown(knock_out_rows(routed)),
        _KNOCK_OUT_NOTE,
        *(f"![]({name}.png)" for name in figures if name.startswith("knock_out")),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


_LAYER_NOTE = (
    "Entropy: of the router's probabilities, in nats. Specialisation: mutual information of expert and domain, or of "
    "expert and modality, in nats. In brackets the part of the most that is possible."
)
_KNOCK_OUT_NOTE = (
    "Held-out loss in nats per answer token, and what is added to it when one expert's delta is zero in all layers."
)


def layer_rows(routed: Routed) -> Rows:
    """A row a layer."""
    names = ("entropy", "domain_information", "modality_information")
    rows = [["layer", *_experts(routed), "entropy", "domain specialisation", "modality specialisation"]]
    for one in layer_statistics(routed):
        rows.append([str(one["layer"]), *map(_percent, one["share"]), *(_with_part(one, name) for name in names)])
    return rows


def use_rows(routed: Routed) -> Rows:
    """A row for each modality of each domain that has a token."""
    rows = [["domain", "modality", "tokens", *_experts(routed)]]
    for name, of_domain in zip(routed.domains, routed.tokens, strict=True):
        for modality, counts in zip(MODALITIES, of_domain, strict=True):
            if tokens := int(counts[0].sum()):
                rows.append([name, modality, f"{tokens:,}", *map(_percent, shares(counts).mean(axis=0))])
    return rows


def knock_out_rows(routed: Routed) -> Rows:
    """A row an expert, after one of the loss with all of them."""
    rows = [["without", *routed.domains], ["(loss with all)", *(f"{loss:.3f}" for loss in routed.losses)]]
    rows += [
        [name, *(f"{delta:+.3f}" for delta in deltas)]
        for name, deltas in zip(_experts(routed), routed.knock_out, strict=True)
    ]
    return rows


def findings(routed: Routed) -> list[str]:
    """Names, a line each, what is wrong: collapsed layers, dead experts, records that were not used."""
    share, found = routed.share, []
    for layer, expert in collapsed_layers(share):
        found.append(
            f"layer {layer} has collapsed: expert {expert} gets {_percent(share[layer, expert])} of the tokens"
        )
    for layer, expert in dead_experts(share):
        found.append(
            f"layer {layer}: expert {expert} is dead, it gets {100 * share[layer, expert]:.2f} % of the tokens"
        )
    if not found:
        found.append(
            f"No collapsed layer (one expert with over {100 * COLLAPSED:g} % of the tokens) and no dead expert (under "
            f"{100 * DEAD:g} % of an equal share)."
        )
    for name, skipped in zip(routed.domains, routed.skipped, strict=True):
        found += [f"{name}: {count} records were skipped: {why}" for why, count in skipped.items()]
    return found


def _experts(routed: Routed) -> list[str]:
    return [f"expert {expert}" for expert in range(routed.tokens.shape[-1])]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _with_part(one: dict[str, Any], name: str) -> str:
    part = one[f"{name}_part"]
    return f"{one[name]:.3f} ({ABSENT if part is None else _percent(part)})"
