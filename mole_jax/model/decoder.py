"""The Llama decoder, with room for adapters at every projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mole_jax.adapters.balance import RouterUse, router_use
from mole_jax.adapters.grouping import group, sort_tokens, unsort_tokens
from mole_jax.adapters.router import Routing, router_logits
from mole_jax.errors import UserError
from mole_jax.model.architecture import DecoderArchitecture
from mole_jax.model.layers import Linear, Remat, RMSNorm, attention, rematerialised
from mole_jax.model.rotary import rotate, rotations
from mole_jax.parallel.region import enter_split, in_region, leave_split
from mole_jax.parallel.sharding import constrain, partition
from mole_jax.parameters import Declare, DecoderParam, Parameter, normal


class AdapterFactory(Protocol):
    """What the decoder asks of `mole_jax.adapters.build.Adapters`."""

    @property
    def route_by(self) -> str: ...

    def router(self, declare: Declare, width: int) -> Any: ...

    def shared_router(self, declare: Declare, width: int) -> Any: ...

    def route(self, logits: Float[Array, "B S E"]) -> Routing: ...

    def by_domain(self, domain_ids: Int[Array, "B S"]) -> Float[Array, "B S E"]: ...

    def groups(self, tokens: int) -> bool: ...

    def projection(self, declare: Declare, target: str, d_in: int, d_out: int, axes: tuple[str, str]) -> Any: ...


class Cache(NamedTuple):
    """Keys and values of the tokens so far, all layers stacked."""

    k: Float[Array, "L B T K C"]
    v: Float[Array, "L B T K C"]
    length: Int[Array, " B"]
    """Slots in use, per row."""
    prompt: Float[Array, "B P"]
    """What the routers see of the prompt (P = D) where they route by instance; else P = 0."""


class Hints(NamedTuple):
    """What routers may be told of a batch besides its tokens (`AdapterConfig.route_by`)."""

    prompt: Bool[Array, "B S"]
    """The tokens of each segment that stand before its first answer."""
    domain_ids: Int[Array, "B S"]


class Frame(NamedTuple):
    """What every layer of one forward pass shares."""

    rotation: Float[Array, "2 B S 1 C/2"]
    mask: Bool[Array, "B 1 S T"]
    classes: Float[Array, "B S K"] | None
    """One-hot classes of tokens to sum router statistics over; None: no statistics."""
    slots: Int[Array, " B"] | None = None
    """First cache slot to write, per row; None: no cache."""
    seen: Float[Array, "B S D"] | None = None
    """What the routers of all layers look at; None: at their layer's input."""
    logits: Float[Array, "B S E"] | None = None
    """What the routers of all layers say; None: each layer says its own."""
    router: Float[Array, "D E"] | None = None
    """The router that all layers share, where each uses it on its own input."""


Keep = dict[str, Bool[Array, "B S I"] | None]
"""Which elements of a projection's input its adapter's dropout keeps, by the projection's name."""


class AdaptedLinear(Linear):
    """A projection and its adapter, if it has one."""

    def __init__(
        self, declare: Declare, adapters: AdapterFactory, target: str, d_in: int, d_out: int, axes: tuple[str, str]
    ):
        super().__init__(declare, d_in, d_out, axes)
        self.adapter = adapters.projection(declare, target, d_in, d_out, axes)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "B S I"], routing: Routing | None, keep: Bool[Array, "B S I"] | None
    ) -> Float[Array, "B S O"]:
        y = super().__call__(x)
        if self.adapter is None:
            return y
        return y + (self.adapter(x, keep) if routing is None else self.adapter(x, routing, keep))


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: AdapterFactory):
        width, inner, kv = arch.width, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        self.q_proj = AdaptedLinear(declare, adapters, "q_proj", width, inner, ("embed", "heads"))
        self.k_proj = AdaptedLinear(declare, adapters, "k_proj", width, kv, ("embed", "kv_heads"))
        self.v_proj = AdaptedLinear(declare, adapters, "v_proj", width, kv, ("embed", "kv_heads"))
        self.o_proj = AdaptedLinear(declare, adapters, "o_proj", inner, width, ("heads", "embed"))
        self.head_dim = arch.head_dim

    def __call__(
        self, x: Float[Array, "B S D"], frame: Frame, kv_cache: tuple[Array, Array] | None, keep: Keep
    ) -> tuple[Float[Array, "B S D"], tuple[Array, Array] | None]:
        x = enter_split(x)
        q, k, v = (
            getattr(self, name)(x, None, keep.get(name)).reshape(*x.shape[:2], -1, self.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q, frame.rotation), rotate(k, frame.rotation)
        if kv_cache is not None:
            k, v = kv_cache = _write(kv_cache[0], k, frame.slots), _write(kv_cache[1], v, frame.slots)
        y = self.o_proj(attention(q, k, v, frame.mask), None, keep.get("o_proj"))
        return leave_split(y), kv_cache


class Mlp(nnx.Module):
    """SwiGLU; the router, if any, looks at the block's input and its choice serves all three projections."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: AdapterFactory):
        width, mlp = arch.width, arch.mlp_width
        self.router = adapters.router(declare, width)
        self.adapters = adapters
        self.gate_proj = AdaptedLinear(declare, adapters, "gate_proj", width, mlp, ("embed", "mlp"))
        self.up_proj = AdaptedLinear(declare, adapters, "up_proj", width, mlp, ("embed", "mlp"))
        self.down_proj = AdaptedLinear(declare, adapters, "down_proj", mlp, width, ("mlp", "embed"))

    def __call__(
        self, x: Float[Array, "B S D"], keep: Keep, frame: Frame | None = None
    ) -> tuple[Float[Array, "B S D"], Routing | None]:
        """`frame` says how the decoder routes where that is not the layer's own affair."""
        logits = self.logits(x, frame)
        if logits is None:
            return leave_split(self.project(enter_split(x), None, keep)), None
        routing = self.adapters.route(logits)
        shared = routing._replace(gates=enter_split(routing.gates))
        if not self.adapters.groups(x.shape[0] * x.shape[1]):
            return leave_split(self.project(enter_split(x), shared, keep)), routing
        # Once for all three projections, frozen matrices included: they do not care for the order of the tokens.
        groups = group(routing.choice)
        by_expert = Routing(
            gates=sort_tokens(shared.gates, groups),
            probs=sort_tokens(shared.probs, groups),
            choice=sort_tokens(shared.choice, groups),
            groups=groups,
        )
        kept = {name: mask if mask is None else sort_tokens(mask, groups) for name, mask in keep.items()}
        y = self.project(sort_tokens(enter_split(x), groups), by_expert, kept)
        return unsort_tokens(leave_split(y), groups, x.shape[:2]), routing

    def logits(self, x: Float[Array, "B S D"], frame: Frame | None) -> Float[Array, "B S E"] | None:
        """Returns what the layer's router, or that of all layers, says; None without routed experts."""
        if frame is not None:
            if frame.logits is not None:
                return frame.logits
            x = x if frame.seen is None else frame.seen
            if frame.router is not None:
                return router_logits(x, frame.router)
        return None if self.router is None else self.router(x)

    def project(self, x: Float[Array, "B S D"], routing: Routing | None, keep: Keep) -> Float[Array, "B S D"]:
        """Returns the SwiGLU of `x`; in a region, this device's part of a sum."""
        gate, up = (getattr(self, name)(x, routing, keep.get(name)) for name in ("gate_proj", "up_proj"))
        return self.down_proj(jax.nn.silu(gate) * up, routing, keep.get("down_proj"))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP; all parameters may carry a leading layer axis."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: AdapterFactory):
        self.attention_norm = RMSNorm(declare, arch.width, arch.norm_eps)
        self.attention = Attention(declare, arch, adapters)
        self.mlp_norm = RMSNorm(declare, arch.width, arch.norm_eps)
        self.mlp = Mlp(declare, arch, adapters)

    def keep(self, key: PRNGKeyArray | None, rows: int, length: int) -> Keep:
        """Draws the dropout of a whole batch (outside of regions, so that it does not depend on the mesh)."""
        if key is None:
            return {}
        drawn: Keep = {}
        for block, block_key in zip((self.attention, self.mlp), jax.random.split(key), strict=True):
            names = [name for name in PROJECTIONS if hasattr(block, name)]
            for name, name_key in zip(names, jax.random.split(block_key, len(names)), strict=True):
                adapter = getattr(block, name).adapter
                drawn[name] = None if adapter is None else adapter.keep(name_key, rows, length)
        return drawn

    def __call__(
        self, x: Float[Array, "B S D"], frame: Frame, kv_cache: tuple[Array, Array] | None, keep: Keep
    ) -> tuple[Float[Array, "B S D"], RouterUse | None, tuple[Array, Array] | None]:
        y, kv_cache = self.attention(self.attention_norm(x), frame, kv_cache, keep)
        x = x + y
        y, routing = self.mlp(self.mlp_norm(x), keep, frame)
        use = None if routing is None or frame.classes is None else router_use(routing, frame.classes)
        return x + y, use, kv_cache


PROJECTIONS: Mapping[str, str] = {
    "q_proj": "width",
    "k_proj": "width",
    "v_proj": "width",
    "o_proj": "heads",
    "gate_proj": "width",
    "up_proj": "width",
    "down_proj": "mlp",
}
"""The named axis along which the input of each projection is cut in a region."""


class Decoder(nnx.Module):
    """Embedding, L scanned layers, final norm and head."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: AdapterFactory):
        declare = declare.of(DecoderParam)
        self.embedding = declare((arch.vocab, arch.width), ("vocab", "embed"), normal(0.02))
        self.layers = DecoderLayer(declare.layers(arch.layers), arch, adapters)
        self.router = adapters.shared_router(declare, arch.width)
        self.adapters = adapters
        self.norm = RMSNorm(declare, arch.width, arch.norm_eps)
        self.head = None if arch.tied_head else Linear(declare, arch.width, arch.vocab, ("embed", "vocab"))
        self.arch = arch

    def embed(self, tokens: Int[Array, "B S"], dtype: jnp.dtype) -> Float[Array, "B S D"]:
        # Made whole along fsdp first: else every device would look up the rows of all of them.
        table = constrain(self.embedding[...], "vocab", None)
        return jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        *,
        segments: int = 0,
        classes: Float[Array, "B S K"] | None = None,
        hints: Hints | None = None,
        key: PRNGKeyArray | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B S D"], RouterUse | None]:
        """Returns the normed hidden states and, with `segments` > 0, the use of the router in each segment.

        Segments are numbered from 1 in each row, 0 is padding; `segments` is the highest number possible.
        `classes` (one-hot; zero counts nowhere) has the use summed over K classes of tokens in place of segments.
        A token sees the tokens of its own segment up to itself. `key` turns dropout on.

        Raises:
            UserError: the experts are not routed by token, and there are no `hints`.
        """
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = (same & causal)[:, None]
        if classes is None and segments:
            classes = jax.nn.one_hot(segment_ids - 1, segments, dtype=jnp.float32)
        frame = Frame(rotations(positions, self.arch), mask, classes)
        if (by := self.adapters.route_by) != "token":
            if hints is None:
                raise UserError(f"adapter.route_by {by}: the model needs to be told prompts and domains; pass hints")
            if by == "domain":
                frame = frame._replace(logits=self.adapters.by_domain(hints.domain_ids))
            else:
                frame = frame._replace(seen=pooled(x, same & hints.prompt[:, None, :]))
        x, use, _ = self._scan(x, frame, None, key, remat)
        return x, use

    def cached(
        self, x: Float[Array, "B S D"], cache: Cache, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Continues the rows in `cache` by S tokens, of which the first `lengths` of each row are real.

        What is written past a row's length is never seen and overwritten by the next call.

        Raises:
            UserError: the experts are routed by domain, which no one knows of a question.
        """
        if self.adapters.route_by == "domain":
            raise UserError(
                "adapter.route_by domain: such a model cannot answer questions, for no one tells it their domain; it "
                "is a bound for studies (evaluation.generate False)"
            )
        offsets = jnp.arange(x.shape[1])
        positions = cache.length[:, None] + offsets
        visible = jnp.arange(cache.k.shape[2])[None, None, :] <= positions[:, :, None]
        frame = Frame(rotations(positions, self.arch), visible[:, None], None, cache.length)
        prompt = cache.prompt
        if self.adapters.route_by == "instance":
            real = jnp.broadcast_to(offsets < lengths[:, None], x.shape[:2])
            prompt = jnp.where(cache.length[:, None] == 0, pooled(x, real[:, None])[:, 0], prompt)
            frame = frame._replace(seen=jnp.broadcast_to(prompt[:, None], x.shape))
        x, _, layers = self._scan(x, frame, (cache.k, cache.v), None, "none")
        k, v = layers  # pyright: ignore[reportGeneralTypeIssues]  with a cache given there is one
        return x, Cache(k, v, cache.length + lengths, prompt)

    def empty_cache(self, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        shape = (self.arch.layers, rows, slots, self.arch.kv_heads, self.arch.head_dim)
        k, v = (constrain(jnp.zeros(shape, dtype), "layers", "batch", None, "kv_heads", None) for _ in range(2))
        seen = self.arch.width if self.adapters.route_by == "instance" else 0
        prompt = constrain(jnp.zeros((rows, seen), jnp.float32), "batch", None)
        return Cache(k, v, constrain(jnp.zeros(rows, jnp.int32), "batch"), prompt)

    def head_matrix(self, dtype: jnp.dtype) -> Float[Array, "D V"]:
        """Returns the head's matrix, made whole along fsdp."""
        kernel = self.embedding[...].T if self.head is None else self.head.kernel[...]
        return constrain(kernel.astype(dtype), None, "vocab")

    def logits(self, x: Float[Array, "*B D"], matrix: Float[Array, "D V"] | None = None) -> Float[Array, "*B V"]:
        """Returns float32 logits of normed hidden states; `matrix` is `head_matrix`, where it was made before."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        matrix = self.head_matrix(x.dtype) if matrix is None else matrix
        logits = jnp.matmul(x, matrix, preferred_element_type=wide)
        return constrain(logits, "batch", *(None,) * (x.ndim - 2), "vocab")

    def _scan(self, x: Array, frame: Frame, kv: tuple[Array, Array] | None, key: PRNGKeyArray | None, remat: Remat):
        graph, state = nnx.split(self.layers)
        weights = jax.tree.map(lambda p: p[...], state, is_leaf=lambda p: isinstance(p, Parameter))
        specs = jax.tree.map(
            lambda p: partition(*p.get_metadata("axes")[1:]), state, is_leaf=lambda p: isinstance(p, Parameter)
        )
        keys = None if key is None else jax.random.split(key, self.arch.layers)
        if self.router is not None:
            frame = frame._replace(router=self.router.kernel[...])
        rows, cache_spec = partition("batch"), partition("batch", None, "kv_heads", None)
        specs_of: Any = dict.fromkeys(Frame._fields, rows)
        frame_spec = Frame(**specs_of | {"rotation": partition(None, "batch"), "router": partition()})

        def run(weights: Any, x: Array, frame: Frame, kv: tuple[Array, Array] | None, keep: Keep):
            return nnx.merge(graph, weights)(x, frame, kv, keep)

        def layer(x: Array, inputs: tuple):
            weights, kv, key = inputs
            keep = nnx.merge(graph, weights).keep(key, *x.shape[:2])
            keep_specs = {name: partition("batch", None, PROJECTIONS[name]) for name in keep}
            x, use, kv = in_region(
                run,
                weights,
                specs,
                (constrain(x, "batch"), frame, kv, keep),
                (rows, frame_spec, cache_spec, keep_specs),
                (rows, rows, cache_spec),
            )
            return constrain(x, "batch"), (use, kv)

        x, (use, kv) = jax.lax.scan(rematerialised(layer, remat), x, (weights, kv, keys))
        return self.norm(x), use, kv


def pooled(x: Float[Array, "B S D"], counted: Bool[Array, "B Q S"]) -> Float[Array, "B Q D"]:
    """Returns means over the counted tokens; tokens and means are brought to a root mean square of 1, in float32."""
    normal = _unit(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    sums = jnp.einsum("bqs,bsd->bqd", counted.astype(normal.dtype), normal, precision=jax.lax.Precision.HIGHEST)
    return _unit(sums / jnp.maximum(counted.sum(axis=-1, keepdims=True), 1))


def _unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-12)


def _write(
    old: Float[Array, "B T K C"], new: Float[Array, "B S K C"], slots: Int[Array, " B"] | None
) -> Float[Array, "B T K C"]:
    """Writes `new` into each row of the cache from the row's slot on."""
    return jax.vmap(lambda row, piece, slot: jax.lax.dynamic_update_slice(row, piece, (slot, 0, 0)))(
        old, new.astype(old.dtype), slots
    )
