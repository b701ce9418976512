"""The MoLE block against the released one (goldens/mole_block), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mole_jax.adapters.balance import balance_loss_sum, domain_loss_sum, router_use
from mole_jax.adapters.build import Adapters
from mole_jax.adapters.router import Routing, route
from mole_jax.config import AdapterConfig
from mole_jax.model.architecture import DecoderArchitecture
from mole_jax.model.decoder import Mlp
from mole_jax.parameters import AdapterParam, Declare, declared, flatten, streams, unflatten

FILES = ("e3_r4", "e8_r2")


@pytest.fixture(params=FILES)
def golden(request, goldens):
    with jax.enable_x64(True):
        yield dict(np.load(goldens / "mole_block" / f"{request.param}.npz"))


def build_graph(golden, gradient: str, kind: str = "mole") -> nnx.GraphDef:
    """Returns our MLP of the released block's sizes, without its arrays."""
    d, f, experts, rank, alpha = (int(n) for n in golden["hyper"][:5])
    arch = DecoderArchitecture(vocab=8, width=d, mlp_width=f, layers=1, heads=1, kv_heads=1, head_dim=d, max_position=8)
    config = AdapterConfig(
        kind=kind,
        rank=rank,
        alpha=float(alpha),
        dropout=0.0,
        experts=experts,
        router_bias=True,
        router_gradient=gradient,
    )
    return nnx.graphdef(nnx.eval_shape(lambda: Mlp(Declare(AdapterParam, streams(0)), arch, Adapters(config))))


def build(golden, gradient: str):
    """Returns (graph, arrays by path in float64) of our MLP with the released weights."""
    return build_graph(golden, gradient), ours(golden, "w/", int(golden["hyper"][2]))


def ours(golden, prefix: str, experts: int) -> dict[str, jax.Array]:
    """The released names and layouts (torch's (out, in), one array per expert) as ours."""
    leaves = {}
    for name in ("gate", "up", "down"):
        if prefix == "w/":
            leaves[f"{name}_proj/kernel"] = golden[f"w/original_module.{name}_proj.weight"].T
        for matrix in ("a", "b"):
            stack = [golden[f"{prefix}moe_{name}.{e}.lora_{matrix.upper()}"].T for e in range(experts)]
            leaves[f"{name}_proj/adapter/{matrix}"] = np.concatenate(stack, axis=1 if matrix == "a" else 0)
    leaves["router/kernel"] = golden[f"{prefix}router.weight"].T
    leaves["router/bias"] = golden[f"{prefix}router.bias"]
    return {path: jnp.asarray(leaf) for path, leaf in leaves.items()}


def call(graph, leaves, x):
    return nnx.merge(graph, unflatten(leaves))(x)


@pytest.mark.parametrize("kind", ["cpu", "TPU"])
@pytest.mark.parametrize(("gradient", "prefix"), [("none", "sparse"), ("dense", "dense")])
def test_outputs_and_gradients_equal_the_released_block(golden, gradient, prefix, kind, monkeypatch):
    """With rows and tokens as one axis, as on a CPU, and as two, as on a TPU."""
    monkeypatch.setattr("mole_jax.adapters.tuning.kind_in_force", lambda: kind)
    graph, leaves = build(golden, gradient)
    x, cotangent = jnp.asarray(golden["x"]), jnp.asarray(golden["cotangent"])
    (y, routing), pull = jax.vjp(lambda leaves, x: call(graph, leaves, x), leaves, x)
    zero = jax.tree.map(jnp.zeros_like, routing)
    grads, dx = pull((cotangent, zero))

    np.testing.assert_allclose(routing.probs, golden["probs"], atol=1e-6, rtol=0)
    np.testing.assert_array_equal(routing.choice, golden["choice"])
    np.testing.assert_allclose(y, golden[f"{prefix}/y"], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(dx, golden[f"{prefix}/dx"], atol=1e-6, rtol=1e-6)
    expected = ours(golden, f"{prefix}/grad/", int(golden["hyper"][2]))
    assert any(np.abs(leaf).max() > 1e-3 for path, leaf in expected.items() if path.endswith("/a"))
    for path, leaf in expected.items():
        np.testing.assert_allclose(grads[path], leaf, atol=1e-6, rtol=1e-6, err_msg=path)


def test_balance_loss_and_its_gradient_equal_the_released_one(golden):
    graph, leaves = build(golden, "none")
    mask = jnp.asarray(golden["mask"])
    segments = mask[..., None].astype(jnp.float64)

    def mean_loss(leaves, kind):
        _, routing = call(graph, leaves, jnp.asarray(golden["x"]))
        use = jax.tree.map(lambda leaf: leaf[None], router_use(routing, segments))
        return balance_loss_sum(use, kind) / len(mask)

    for kind in ("per_layer", "pooled"):  # one layer: both are the same
        loss, grads = jax.value_and_grad(mean_loss)(leaves, kind)
        np.testing.assert_allclose(loss, golden["balance_loss"], atol=1e-6, rtol=0)
        np.testing.assert_allclose(grads["router/kernel"].T, golden["balance/grad/router.weight"], atol=1e-6)
        np.testing.assert_allclose(grads["router/bias"], golden["balance/grad/router.bias"], atol=1e-6)


def test_domain_loss_of_one_token_is_the_cross_entropy_of_its_router():
    """Two layers; three rows of two segments of one token, the last of them padding; five domains, three experts."""
    logits = jax.random.normal(jax.random.key(0), (2, 3, 2, 3))
    domains, padding = jnp.array([[0, 1], [2, 3], [4, 0]]), jnp.array([[0, 0], [0, 0], [0, 1]])
    classes = jnp.eye(2) * (1 - padding)[..., None]

    def loss(logits):
        layers = [router_use(route(layer, "none"), classes) for layer in logits]
        return domain_loss_sum(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), domains)

    def expected(logits):
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(domains % 3, (2, 3, 2)))
        return (each.mean(axis=0) * (1 - padding)).sum()

    for ours, theirs in zip(jax.value_and_grad(loss)(logits), jax.value_and_grad(expected)(logits), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-6)


def test_domain_loss_of_an_example_looks_at_its_mean_probability():
    probs = jnp.array([[[0.5, 0.5], [0.1, 0.9], [1.0, 0.0]]])
    routing = Routing(probs, probs, jnp.eye(2)[jnp.array([[0, 1, 0]])])
    use = jax.tree.map(lambda leaf: leaf[None], router_use(routing, jnp.array([[[1.0], [1.0], [0.0]]])))
    np.testing.assert_allclose(domain_loss_sum(use, jnp.array([[1]])), -np.log((0.5 + 0.9) / 2), rtol=1e-6)


@pytest.mark.parametrize("gradient", ["straight_through", "gate_scaled"])
def test_other_router_gradients_match_their_definition(golden, gradient):
    """straight_through: forward of `none`, backward of softmax; gate_scaled: y = W0 x + p_k E_k(x)."""
    graph, leaves = build(golden, gradient)
    literal, _ = build(golden, "none")
    x, cotangent = jnp.asarray(golden["x"]), jnp.asarray(golden["cotangent"])

    def mlp_by_definition(leaves, x, weights):
        """The block written from method.md, expert by expert, with given gates (B, S, E)."""
        experts, rank, alpha = (int(n) for n in golden["hyper"][2:5])

        def project(name, x):
            a, b = leaves[f"{name}_proj/adapter/a"], leaves[f"{name}_proj/adapter/b"]
            y = x @ leaves[f"{name}_proj/kernel"]
            for e in range(experts):
                part = slice(e * rank, (e + 1) * rank)
                y = y + weights[..., e, None] * (alpha / rank) * (x @ a[:, part] @ b[part])
            return y

        return project("down", jax.nn.silu(project("gate", x)) * project("up", x))

    def loss(leaves):
        return (call(graph, leaves, x)[0] * cotangent).sum()

    def by_definition(leaves):
        probs = jax.nn.softmax(x @ leaves["router/kernel"] + leaves["router/bias"])
        choice = jnp.asarray(golden["choice"])
        straight = jax.lax.stop_gradient(choice - probs) + probs
        weights = choice * probs if gradient == "gate_scaled" else straight
        return (mlp_by_definition(leaves, x, weights) * cotangent).sum()

    if gradient == "straight_through":
        np.testing.assert_array_equal(call(graph, leaves, x)[0], call(literal, leaves, x)[0])
    value, grads = jax.value_and_grad(loss)(leaves)
    expected, expected_grads = jax.value_and_grad(by_definition)(leaves)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert np.abs(grads["router/kernel"]).max() > 1e-4
    for path in grads:
        np.testing.assert_allclose(grads[path], expected_grads[path], atol=1e-8, rtol=1e-8, err_msg=path)


def test_one_expert_equals_plain_lora(golden):
    """With E = 1 every gate is 1, whatever the setting, so the block is that of kind lora."""
    x = jnp.asarray(golden["x"])
    experts, rank = (int(n) for n in golden["hyper"][2:4])
    _, leaves = build(golden, "none")
    single = {
        path: leaf[..., :rank] if path.endswith("/a") else leaf[:rank] if path.endswith("/b") else leaf
        for path, leaf in leaves.items()
    }
    single["router/kernel"] = single["router/kernel"][:, :1]
    single["router/bias"] = single["router/bias"][:1]
    golden_one = {**golden, "hyper": np.concatenate([golden["hyper"][:2], [1], golden["hyper"][3:]])}
    lora_graph = build_graph(golden, "none", kind="lora")
    lora = {path: leaf for path, leaf in single.items() if not path.startswith("router")}
    expected, routing = call(lora_graph, lora, x)
    assert routing is None
    assert experts > 1
    for gradient in ("none", "straight_through", "gate_scaled", "dense"):
        graph = build_graph(golden_one, gradient)
        np.testing.assert_array_equal(call(graph, single, x)[0], expected)


def test_router_has_no_bias_by_default_and_float32_logits():
    arch = DecoderArchitecture(
        vocab=8, width=16, mlp_width=32, layers=1, heads=1, kv_heads=1, head_dim=16, max_position=8
    )
    mlp = Mlp(Declare(AdapterParam, streams(0)), arch, Adapters(AdapterConfig(rank=2)))
    assert [path for path in declared(mlp) if path.startswith("router")] == ["router/kernel"]
    _, routing = mlp(jnp.ones((1, 3, 16), jnp.bfloat16))
    assert routing.probs.dtype == jnp.float32
    assert flatten({"a": {"b": 1}}) == {"a/b": 1}
