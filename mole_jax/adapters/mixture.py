"""How a decoder's experts are chosen. Everything that `AdapterConfig` says about routing is read here.

The decoder asks at three points. Before its layers, `Mixture.context` (`Mixture.continued` while decoding) returns what
the routers of all layers share. In each MLP, `Mixture.route` turns that and the layer's input into a `Routing`, and
`Mixture.apply` runs the projections under it, on tokens sorted by expert where that is faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mole_jax.adapters.dropout import Draw
from mole_jax.adapters.grouping import group, sort_tokens, unsort_tokens
from mole_jax.adapters.router import Router, Routing, route, router_logits
from mole_jax.adapters.tuning import sorting_pays
from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.parallel.region import enter_split
from mole_jax.parallel.sharding import constrain, partition
from mole_jax.parameters import Declare


class Hints(NamedTuple):
    """What routers may be told of a batch besides its tokens (`AdapterConfig.route_by`)."""

    prompt: Bool[Array, "B S"]
    """The tokens of each segment that come before its first answer."""
    domain_ids: Int[Array, "B S"]


class Context(NamedTuple):
    """What the routers of all layers share in one forward pass; a field is None where each layer has its own."""

    inputs: Float[Array, "B S D"] | None = None
    """Router input. None: the input of the layer's MLP."""
    logits: Float[Array, "B S E"] | None = None
    """Router output. None: the router computes it."""
    kernel: Float[Array, "D E"] | None = None
    """The router's matrix. None: the layer's own."""

    @classmethod
    def specs(cls) -> Context:
        """Returns how the fields are split over a mesh, as a tree of `PartitionSpec`."""
        rows, whole = partition("batch"), partition()
        return cls(rows, rows, whole)  # pyright: ignore[reportArgumentType]  a tree of specs in place of arrays


OWN = Context()
"""Every layer routes by its own input and router."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How the experts of a decoder are chosen."""

    config: AdapterConfig
    routed: bool
    """Whether there is anything to choose."""

    @property
    def _by(self) -> str:
        return self.config.route_by if self.routed else "token"

    def layer_router(self, declare: Declare, width: int) -> Router | None:
        """Makes the router of one layer, if each layer has its own."""
        return None if self.config.shared_router else self._router(declare, width)

    def shared_router(self, declare: Declare, width: int) -> Router | None:
        """Makes the router of all layers, if they share one."""
        return self._router(declare, width) if self.config.shared_router else None

    def _router(self, declare: Declare, width: int) -> Router | None:
        if not self.routed or self._by == "domain":
            return None
        standardised = self.config.router_input == "standardised"
        return Router(declare, width, self.config.experts, bias=self.config.router_bias, standardised=standardised)

    def context(
        self, x: Float[Array, "B S D"], segment_ids: Int[Array, "B S"], hints: Hints | None, shared: Router | None
    ) -> Context:
        """Returns what the routers share in training; `x` is the input of the first layer.

        Raises:
            UserError: the experts are not routed by token and there are no hints.
        """
        if self._by == "token":
            return _with_router(OWN, shared)
        if hints is None:
            raise UserError(f"adapter.route_by {self._by}: the model needs to be told prompts and domains; pass hints")
        if self._by == "domain":
            return Context(logits=self._by_domain(hints.domain_ids))
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        return _with_router(Context(inputs=pooled(x, same & hints.prompt[:, None, :])), shared)

    def remember(
        self,
        x: Float[Array, "B S D"],
        memory: Float[Array, "B P"],
        *,
        first: Bool[Array, " B"],
        real: Bool[Array, "B S"],
    ) -> Float[Array, "B P"]:
        """Returns the memory for decoding these and the next tokens.

        Args:
            x: input of the first layer.
            memory: what `memory` or the last call returned.
            first: rows whose whole prompt this is.
            real: tokens that are not padding.
        """
        if self._by != "instance":
            return memory
        return jnp.where(first[:, None], pooled(x, real[:, None])[:, 0], memory)

    def continued(self, x: Float[Array, "B S D"], memory: Float[Array, "B P"], shared: Router | None) -> Context:
        """Returns what the routers share while decoding the tokens `x`; `shared` is what `shared_router` made.

        Raises:
            UserError: the experts are routed by domain, which a question does not tell.
        """
        if self._by == "domain":
            raise UserError(
                "adapter.route_by domain: such a model cannot answer questions, for no one tells it their domain; it "
                "is a bound for studies (evaluation.generate False)"
            )
        if self._by == "token":
            return _with_router(OWN, shared)
        return _with_router(Context(inputs=jnp.broadcast_to(memory[:, None], x.shape)), shared)

    def memory(self, rows: int, width: int) -> Float[Array, "B P"]:
        """Returns what is remembered of each row's prompt while decoding, before there is any; P may be 0."""
        size = width if self._by == "instance" else 0
        return constrain(jnp.zeros((rows, size), jnp.float32), "batch", None)

    def route(self, router: Router | None, x: Float[Array, "B S D"], context: Context = OWN) -> Routing | None:
        """Returns the choice of one layer for the input `x` of its MLP; None without routed experts."""
        if context.logits is not None:
            logits = context.logits
        else:
            x = x if context.inputs is None else context.inputs
            if context.kernel is not None:
                logits = router_logits(x, context.kernel)
            elif router is not None:
                logits = router(x)
            else:
                return None
        return route(logits, self.config.router_gradient)

    def apply(
        self,
        project: Callable[[Array, Routing | None, Draw | None], Array],
        x: Float[Array, "B S D"],
        routing: Routing | None,
        drawn: Draw | None,
    ) -> Float[Array, "B S D"]:
        """Runs `project`, all projections of an MLP, under `routing`; in a region `x` has been through `enter_split`.

        Where tokens are sorted by expert, they are sorted once for all projections. The frozen matrices do not care
        about the order of the tokens.
        """
        if routing is None:
            return project(x, None, drawn)
        routing = routing._replace(gates=enter_split(routing.gates))
        if not self._sorts(x.shape[0] * x.shape[1]):
            return project(x, routing, drawn)
        groups = group(routing.choice)
        gates, probs, choice = (sort_tokens(one, groups) for one in (routing.gates, routing.probs, routing.choice))
        if drawn is not None:
            drawn = drawn._replace(tokens=sort_tokens(drawn.tokens[..., None], groups)[..., 0])
        y = project(sort_tokens(x, groups), Routing(gates, probs, choice, groups), drawn)
        return unsort_tokens(y, groups, x.shape[:2])

    def _sorts(self, tokens: int) -> bool:
        config = self.config
        if config.expert_path == "auto":
            possible = config.router_gradient != "dense" and config.expert_sharding != "all_to_all"
            return possible and sorting_pays(config.experts * config.rank, tokens)
        return config.expert_path == "grouped"

    def _by_domain(self, domain_ids: Int[Array, "B S"]) -> Float[Array, "B S E"]:
        """Returns logits that leave no choice: domain i goes to expert i modulo E."""
        chosen = jax.nn.one_hot(domain_ids % self.config.experts, self.config.experts)
        return (chosen - 1) * 1e9


def _with_router(context: Context, router: Router | None) -> Context:
    if router is None:
        return context
    inputs = None if context.inputs is None else router.inputs(context.inputs)
    return context._replace(inputs=inputs, kernel=router.kernel[...])


def pooled(x: Float[Array, "B S D"], counted: Bool[Array, "B Q S"]) -> Float[Array, "B Q D"]:
    """Returns means over the counted tokens, in float32; tokens and means are scaled to a root mean square of 1."""
    normal = _unit(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    sums = jnp.einsum("bqs,bsd->bqd", counted.astype(normal.dtype), normal, precision=jax.lax.Precision.HIGHEST)
    return _unit(sums / jnp.maximum(counted.sum(axis=-1, keepdims=True), 1))


def _unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-12)
