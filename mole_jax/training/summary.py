"""What a run writes down: what it trains, and the numbers made of the arrays that a step returns."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mole_jax.adapters.usage import entropy, mutual_information, shares
from mole_jax.model.objective import Sums
from mole_jax.parameters import Parameter, group_of


def trainable_table(declarations: Mapping[str, Parameter], trainable: Collection[str]) -> list[dict[str, str | int]]:
    """Returns a row per kind of parameter: its group, its name with the layers joined, its shape and its size."""
    return [
        {
            "group": group_of(parameter),
            "parameter": path,
            "shape": " x ".join(map(str, parameter.shape)),
            "numbers": parameter.size,
        }
        for path, parameter in declarations.items()
        if group_of(parameter) in trainable
    ]


def format_table(rows: list[dict[str, str | int]]) -> str:
    """Returns the rows of `trainable_table` as aligned text, with the sum."""
    total = sum(int(row["numbers"]) for row in rows)
    lines = [("trains", "parameter", "shape", "numbers")]
    lines += [(str(row["group"]), str(row["parameter"]), str(row["shape"]), f"{row['numbers']:,}") for row in rows]
    lines.append(("", "all", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in lines)


def step_metrics(step_output: Mapping[str, Any], domains: Sequence[str]) -> dict[str, float]:
    """Names the metrics of one step; `step_output` is on the host.

    ``loss`` and ``loss/<domain>`` are means as `train.loss_average` says: over supervised tokens, or over examples of
    the mean over each one's tokens. A domain without a supervised token in the batch has no ``loss/<domain>``.
    ``router/use/<domain>/expert<e>`` is the share of the domain's tokens sent to the expert, averaged over layers;
    ``router/max_share`` is the largest share that one expert has in any layer, 1 where a layer has collapsed. By layer,
    in nats, there are ``router/entropy/layer<l>``, the mean entropy of the router's probabilities,
    ``router/load_entropy/layer<l>``, the entropy of the experts' shares (log E when they are equal, 0 when one expert
    takes all), and, of a batch with several domains, ``router/specialisation/layer<l>``, the mutual information of
    expert and domain.
    """
    sums: Sums = step_output["sums"]
    losses, units = np.asarray(sums.losses, np.float64), np.asarray(sums.units, np.float64)
    metrics = {"loss": float(losses.sum() / max(units.sum(), 1))}
    metrics |= {
        f"loss/{name}": float(loss / count) for name, loss, count in zip(domains, losses, units, strict=True) if count
    }
    metrics |= {name: float(step_output[name]) for name in ("balance_loss", "grad_norm", "learning_rate")}
    metrics["supervised_tokens"] = float(np.asarray(sums.tokens, np.float64).sum())
    use = np.asarray(sums.use, np.float64)
    if not use.size or not use.sum():
        return metrics
    routed = use[:, 0].sum()
    entropies = np.asarray(sums.entropy, np.float64) / routed
    metrics["router/entropy"] = float(entropies.mean())
    metrics |= {f"router/entropy/layer{layer}": float(value) for layer, value in enumerate(entropies)}
    metrics["router/max_share"] = float((use.sum(axis=0) / use.sum(axis=(0, 2))[:, None]).max())
    by_layer = {"load_entropy": entropy(shares(use.sum(axis=0)))}
    if np.count_nonzero(use.sum(axis=(1, 2))) > 1:
        by_layer["specialisation"] = mutual_information(use)
    for name, values in by_layer.items():
        metrics |= {f"router/{name}/layer{layer}": float(value) for layer, value in enumerate(values)}
    for name, of_domain in zip(domains, use, strict=True):
        if of_domain.sum():
            means = shares(of_domain).mean(axis=0)
            metrics |= {f"router/use/{name}/expert{e}": float(share) for e, share in enumerate(means)}
    return metrics


def speed_metrics(
    *,
    seconds: float,
    steps: int,
    waited: float,
    tokens: float,
    flops: float,
    peak_flops: float | None,
    devices: int,
    memory: float,
) -> dict[str, float]:
    """Returns the speed of the last `steps`, which took `seconds`: tokens without padding, wait for data, MFU.

    `memory` is the most bytes that were held so far. MFU is model FLOPs (recomputation not counted) over the chips'
    bfloat16 peak; left out where none is published.
    """
    metrics = {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / steps,
        "data_wait_fraction": min(1.0, waited / seconds),
        "memory_gib": memory / 2**30,
    }
    if peak_flops is not None and math.isfinite(peak_flops):
        metrics["mfu"] = flops * steps / seconds / (peak_flops * devices)
    return metrics
