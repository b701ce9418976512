"""Routing by instance and by domain, one router for all layers, a shared expert: against equal computations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.adapters.build import Adapters
from mole_jax.adapters.mixture import Hints
from mole_jax.config import AdapterConfig
from mole_jax.config_check import check
from mole_jax.errors import UserError
from mole_jax.model.architecture import PRESETS
from mole_jax.model.llava import Llava
from mole_jax.model.objective import hints
from mole_jax.parameters import declared, streams, unflatten
from tests import tiny

ARCH = PRESETS["tiny"]
LAYERS, MLP = ARCH.decoder.layers, "decoder/layers/mlp"
EXACT = {"atol": 5e-6, "rtol": 1e-5}
LENGTHS, PROMPTS = (5, 7, 4), (3, 4, 1)
"""Of the three segments of the row: all tokens, and those before the answer."""
DOMAINS = (0, 1, 2)


def graph_of(**adapter):
    settings = AdapterConfig(**{"experts": 3, "rank": 2, "alpha": 4.0, "router_gradient": "none"} | adapter)
    return nnx.split(nnx.eval_shape(lambda: Llava(ARCH, Adapters(settings), streams(0))))[0]


def arrays(**adapter) -> dict[str, np.ndarray]:
    """Arrays of a model whose adapters and routers are random and strong."""
    settings = AdapterConfig(**{"experts": 3, "rank": 2, "alpha": 4.0, "router_gradient": "none"} | adapter)
    leaves = {path: leaf[...] for path, leaf in declared(Llava(ARCH, Adapters(settings), streams(0))).items()}
    key = jax.random.key(3)
    for i, path in enumerate(leaves):
        if "adapter" in path or "router" in path:
            leaves[path] = 0.5 * jax.random.normal(jax.random.fold_in(key, i), leaves[path].shape)
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def row() -> dict[str, jax.Array]:
    tokens = np.random.default_rng(1).integers(3, 500, (1, sum(LENGTHS)))
    segments = np.repeat([1, 2, 3], LENGTHS)[None]
    positions = np.concatenate([np.arange(n) for n in LENGTHS])[None]
    # The token at t is in the mask where the one at t + 1 is supervised.
    mask = np.concatenate([[*[0] * (p - 1), *[1] * (n - p), 0] for n, p in zip(LENGTHS, PROMPTS, strict=True)])[None]
    domains = np.repeat(DOMAINS, LENGTHS)[None]
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": mask}
    return {name: jnp.asarray(value) for name, value in (batch | {"domain_ids": domains}).items()}


def run(leaves, told: Hints | None = None, **adapter):
    """Returns hidden states and the use of experts (L, K, E) by segment."""
    model = nnx.merge(graph_of(**adapter), unflatten(leaves))
    batch = row()
    hidden, use = model.hidden(
        batch["tokens"],
        jnp.zeros((1, 0, 28, 28, 3)),
        batch["positions"],
        batch["segment_ids"],
        segments=3,
        hints=told or hints(batch),
    )
    return np.asarray(hidden), None if use is None else np.asarray(use.choices)[:, 0]


def test_hints_mark_what_stands_before_the_first_answer_of_each_segment():
    expected = np.concatenate([np.arange(n) < p for n, p in zip(LENGTHS, PROMPTS, strict=True)])
    np.testing.assert_array_equal(hints(row()).prompt[0], expected)
    second_turn = row() | {"loss_mask": jnp.asarray([[0, 1, 0, 1, 0] + [0] * 11])}
    assert hints(second_turn).prompt[0, :5].tolist() == [True, True, False, False, False]


def test_by_domain_each_segment_is_that_of_a_model_with_its_expert_alone():
    leaves = arrays(route_by="domain")
    assert not any("router" in path for path in leaves)
    hidden, use = run(leaves, route_by="domain")
    np.testing.assert_array_equal(use, np.broadcast_to(np.diag(LENGTHS), (LAYERS, 3, 3)))
    begin = 0
    for expert, length in enumerate(LENGTHS):
        alone = dict(leaves)
        for name in ("gate_proj", "up_proj", "down_proj"):
            own = slice(2 * expert, 2 * expert + 2)
            alone[f"{MLP}/{name}/adapter/a"] = leaves[f"{MLP}/{name}/adapter/a"][..., own]
            alone[f"{MLP}/{name}/adapter/b"] = leaves[f"{MLP}/{name}/adapter/b"][:, own]
        expected, _ = run(alone, kind="lora")
        np.testing.assert_allclose(hidden[:, begin : begin + length], expected[:, begin : begin + length], **EXACT)
        begin += length


def test_by_instance_a_segment_goes_to_one_expert_that_its_prompt_alone_decides():
    leaves = arrays(route_by="instance")
    _, use = run(leaves, route_by="instance")
    np.testing.assert_array_equal(np.sort(use, axis=-1)[..., :-1], 0)
    np.testing.assert_array_equal(use.sum(axis=-1), np.broadcast_to(LENGTHS, (LAYERS, 3)))
    # The definition, by hand: unit tokens, their mean over the prompt, made unit, through each layer's router.
    embedding, kernels = leaves["decoder/embedding"], leaves[f"{MLP}/router/kernel"]
    tokens, begin = np.asarray(row()["tokens"])[0], 0
    for segment, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        seen = embedding[tokens[begin : begin + prompt]]
        mean = (seen / np.sqrt((seen**2).mean(axis=-1, keepdims=True))).mean(axis=0)
        best = np.argmax(mean @ kernels, axis=-1)
        np.testing.assert_array_equal(np.argmax(use[:, segment], axis=-1), best)
        begin += length


def test_one_router_equals_a_router_a_layer_with_the_same_matrix():
    shared = arrays(shared_router=True)
    own = {path: leaf for path, leaf in shared.items() if path != "decoder/router/kernel"}
    own[f"{MLP}/router/kernel"] = np.broadcast_to(shared["decoder/router/kernel"], (LAYERS, ARCH.decoder.width, 3))
    for by in ("token", "instance"):
        (a, use), (b, other) = run(shared, shared_router=True, route_by=by), run(own, route_by=by)
        np.testing.assert_allclose(a, b, **EXACT)
        np.testing.assert_array_equal(use, other)
    assert len(np.unique(np.argmax(use, axis=-1))) > 1


def test_a_shared_expert_equals_experts_that_each_hold_it():
    leaves = arrays(shared_rank=1)
    wide = {path: leaf for path, leaf in leaves.items() if "/shared/" not in path}
    for name in ("gate_proj", "up_proj", "down_proj"):
        adapter = f"{MLP}/{name}/adapter"
        a, b = (leaves[f"{adapter}/{matrix}"] for matrix in "ab")
        shared_a, shared_b = (leaves[f"{adapter}/shared/{matrix}"] for matrix in "ab")
        wide[f"{adapter}/a"] = np.concatenate(
            [part for e in range(3) for part in (a[..., 2 * e : 2 * e + 2], shared_a)], axis=-1
        )
        wide[f"{adapter}/b"] = np.concatenate(
            [part for e in range(3) for part in (b[:, 2 * e : 2 * e + 2], shared_b)], axis=1
        )
    hidden, use = run(leaves, shared_rank=1)
    # The arrays say their rank, the settings only the scale alpha / rank.
    expected, other = run(wide, rank=3, alpha=6.0)
    np.testing.assert_allclose(hidden, expected, **EXACT)
    np.testing.assert_array_equal(use, other)


def test_what_cannot_be_told_or_answered_is_refused(tmp_path):
    model = nnx.merge(graph_of(route_by="instance"), unflatten(arrays(route_by="instance")))
    batch = row()
    with pytest.raises(UserError, match="pass hints"):
        model(batch["tokens"], jnp.zeros((1, 0, 28, 28, 3)), batch["positions"], batch["segment_ids"])
    data = tiny.write_data(tmp_path)
    for changes, message in (
        ({"route_by": "domain"}, r"route_by domain cannot answer .* evaluation\.generate False"),
        ({"shared_router": True, "router_bias": True}, r"shared_router has no bias"),
        ({"route_by": "domain", "domain_weight": 0.1}, r"domain has no router that adapter\.domain_weight could teach"),
        (
            {"domain_weight": 0.1, "experts": 4},
            r"each of 3 domains and leaves the rest of adapter\.experts 4 idle; set adapter\.experts 3",
        ),
        ({"domain_weight": -0.1}, r"adapter\.domain_weight is -0\.1, it must not be negative"),
        ({"shared_rank": -1}, r"shared_rank is -1"),
    ):
        with pytest.raises(UserError, match=message):
            check(tiny.config(data, adapter=changes))
