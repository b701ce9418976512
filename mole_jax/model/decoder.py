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
from mole_jax.adapters.router import Routing
from mole_jax.model.architecture import DecoderArchitecture
from mole_jax.model.layers import Linear, Remat, RMSNorm, attention, rematerialised
from mole_jax.model.rotary import rotate, rotations
from mole_jax.parallel.region import enter_split, in_region, leave_split
from mole_jax.parallel.sharding import constrain, partition
from mole_jax.parameters import Declare, DecoderParam, Parameter, normal


class AdapterFactory(Protocol):
    """What the decoder asks of `mole_jax.adapters.build.Adapters`."""

    def router(self, declare: Declare, width: int) -> Any: ...

    def groups(self, tokens: int) -> bool: ...

    def projection(self, declare: Declare, target: str, d_in: int, d_out: int, axes: tuple[str, str]) -> Any: ...


class Cache(NamedTuple):
    """Keys and values of the tokens so far, all layers stacked."""

    k: Float[Array, "L B T K C"]
    v: Float[Array, "L B T K C"]
    length: Int[Array, " B"]
    """Slots in use, per row."""


class Frame(NamedTuple):
    """What every layer of one forward pass shares."""

    rotation: Float[Array, "2 B S 1 C/2"]
    mask: Bool[Array, "B 1 S T"]
    segments: Float[Array, "B S K"] | None
    """One-hot segments, to sum router statistics over; None: no statistics."""
    slots: Int[Array, " B"] | None
    """First cache slot to write, per row; None: no cache."""


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

    def __call__(self, x: Float[Array, "B S D"], keep: Keep) -> tuple[Float[Array, "B S D"], Routing | None]:
        if self.router is None:
            return leave_split(self.project(enter_split(x), None, keep)), None
        routing = self.router(x)
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
        y, routing = self.mlp(self.mlp_norm(x), keep)
        use = None if routing is None or frame.segments is None else router_use(routing, frame.segments)
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
        key: PRNGKeyArray | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B S D"], RouterUse | None]:
        """Returns the normed hidden states and, with `segments` > 0, the use of the router in each segment.

        Segments are numbered from 1 in each row, 0 is padding; `segments` is the highest number possible.
        A token sees the tokens of its own segment up to itself. `key` turns dropout on.
        """
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & causal
        one_hot = jax.nn.one_hot(segment_ids - 1, segments, dtype=jnp.float32) if segments else None
        frame = Frame(rotations(positions, self.arch), mask, one_hot, None)
        x, use, _ = self._scan(x, frame, None, key, remat)
        return x, use

    def cached(
        self, x: Float[Array, "B S D"], cache: Cache, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Continues the rows in `cache` by S tokens, of which the first `lengths` of each row are real.

        What is written past a row's length is never seen and overwritten by the next call.
        """
        offsets = jnp.arange(x.shape[1])
        positions = cache.length[:, None] + offsets
        visible = jnp.arange(cache.k.shape[2])[None, None, :] <= positions[:, :, None]
        frame = Frame(rotations(positions, self.arch), visible[:, None], None, cache.length)
        x, _, layers = self._scan(x, frame, (cache.k, cache.v), None, "none")
        k, v = layers  # pyright: ignore[reportGeneralTypeIssues]  with a cache given there is one
        return x, Cache(k, v, cache.length + lengths)

    def empty_cache(self, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        shape = (self.arch.layers, rows, slots, self.arch.kv_heads, self.arch.head_dim)
        k, v = (constrain(jnp.zeros(shape, dtype), "layers", "batch", None, "kv_heads", None) for _ in range(2))
        return Cache(k, v, constrain(jnp.zeros(rows, jnp.int32), "batch"))

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
        rows, cache_spec = partition("batch"), partition("batch", None, "kv_heads", None)
        frame_spec: Any = Frame(partition(None, "batch"), *(rows,) * 3)  # pyright: ignore[reportArgumentType]

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


def _write(
    old: Float[Array, "B T K C"], new: Float[Array, "B S K C"], slots: Int[Array, " B"] | None
) -> Float[Array, "B T K C"]:
    """Writes `new` into each row of the cache from the row's slot on."""
    return jax.vmap(lambda row, piece, slot: jax.lax.dynamic_update_slice(row, piece, (slot, 0, 0)))(
        old, new.astype(old.dtype), slots
    )
