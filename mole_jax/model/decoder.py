"""The Llama decoder, with room for adapters at every projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mole_jax.adapters.balance import RouterUse, router_use
from mole_jax.adapters.build import Adapters
from mole_jax.adapters.kind import Projection
from mole_jax.adapters.mixture import OWN, Context, Hints, Keep
from mole_jax.adapters.router import Routing
from mole_jax.config import Remat
from mole_jax.model.architecture import DecoderArchitecture
from mole_jax.model.attention import causal_attention
from mole_jax.model.layers import Linear, RMSNorm, rematerialised
from mole_jax.model.quantised import layer_specs, product
from mole_jax.model.rotary import rotate, rotations
from mole_jax.parallel.region import enter_split, in_region, leave_split
from mole_jax.parallel.sharding import constrain, partition
from mole_jax.parameters import Declare, DecoderParam, Parameter, normal

KeysValues = tuple[Array, Array]
"""Keys and values of one layer's cache, (B, T, K, C) each; of all layers with a layer axis in front."""


class Cache(NamedTuple):
    """Keys and values of the tokens so far, with all layers stacked."""

    k: Float[Array, "L B T K C"]
    v: Float[Array, "L B T K C"]
    length: Int[Array, " B"]
    """Slots in use, per row."""
    memory: Float[Array, "B P"]
    """What the mixture remembers of each row's prompt; P may be 0."""


class Frame(NamedTuple):
    """What every layer of one forward pass shares."""

    rotation: Float[Array, "2 B S 1 C/2"]
    segment_ids: Int[Array, "B S"] | None
    """A token sees only its own segment; None: the whole row."""
    slots: Int[Array, " B"] | None
    """First cache slot to write, per row; None: no cache."""
    classes: Float[Array, "B S K"] | None
    """One-hot classes of tokens to sum router statistics over; None: no statistics."""
    routing: Context
    """What the routers of all layers share."""

    @classmethod
    def specs(cls) -> Frame:
        """Returns how the fields are split over a mesh, as a tree of `PartitionSpec`."""
        rows: Any = partition("batch")
        return cls(partition(None, "batch"), rows, rows, rows, Context.specs())  # pyright: ignore[reportArgumentType]


class AdaptedLinear(nnx.Module):
    """A frozen projection ``x W`` plus the delta of its adapter, if it has one."""

    def __init__(self, declare: Declare, adapters: Adapters, projection: Projection):
        d_in, d_out = projection.d_in, projection.d_out
        self.kernel = declare((d_in, d_out), projection.axes, normal(d_in**-0.5), decay=True)
        self.adapter = adapters.projection(declare, projection)

    def __call__(
        self, x: Float[Array, "B S I"], routing: Routing | None, keep: Bool[Array, "B S I"] | None
    ) -> Float[Array, "B S O"]:
        y = product(x, self.kernel)
        return y if self.adapter is None else y + self.adapter(x, routing, keep)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: Adapters):
        width, inner, kv = arch.width, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        self.q_proj = AdaptedLinear(declare, adapters, Projection("q_proj", width, inner, ("embed", "heads")))
        self.k_proj = AdaptedLinear(declare, adapters, Projection("k_proj", width, kv, ("embed", "kv_heads")))
        self.v_proj = AdaptedLinear(declare, adapters, Projection("v_proj", width, kv, ("embed", "kv_heads")))
        self.o_proj = AdaptedLinear(declare, adapters, Projection("o_proj", inner, width, ("heads", "embed")))
        self.head_dim = arch.head_dim

    @property
    def projections(self) -> dict[str, AdaptedLinear]:
        return {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj, "o_proj": self.o_proj}

    def __call__(
        self, x: Float[Array, "B S D"], frame: Frame, kv_cache: KeysValues | None, keep: Keep
    ) -> tuple[Float[Array, "B S D"], KeysValues | None]:
        x = enter_split(x)
        q = self.heads(self.q_proj(x, None, keep.get("q_proj")))
        k = self.heads(self.k_proj(x, None, keep.get("k_proj")))
        v = self.heads(self.v_proj(x, None, keep.get("v_proj")))
        q, k = rotate(q, frame.rotation), rotate(k, frame.rotation)
        if kv_cache is not None:
            k, v = kv_cache = _write(kv_cache[0], k, frame.slots), _write(kv_cache[1], v, frame.slots)
        y = causal_attention(q, k, v, segment_ids=frame.segment_ids, start=frame.slots)
        return leave_split(self.o_proj(y, None, keep.get("o_proj"))), kv_cache

    def heads(self, x: Float[Array, "B S H*C"]) -> Float[Array, "B S H C"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class Mlp(nnx.Module):
    """SwiGLU. A router, if there is one, sees the block's input, and its choice serves all three projections."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: Adapters):
        width, mlp = arch.width, arch.mlp_width
        self.mixture = adapters.mixture
        self.router = self.mixture.layer_router(declare, width)
        self.gate_proj = AdaptedLinear(declare, adapters, Projection("gate_proj", width, mlp, ("embed", "mlp")))
        self.up_proj = AdaptedLinear(declare, adapters, Projection("up_proj", width, mlp, ("embed", "mlp")))
        self.down_proj = AdaptedLinear(declare, adapters, Projection("down_proj", mlp, width, ("mlp", "embed")))

    @property
    def projections(self) -> dict[str, AdaptedLinear]:
        return {"gate_proj": self.gate_proj, "up_proj": self.up_proj, "down_proj": self.down_proj}

    def __call__(
        self, x: Float[Array, "B S D"], keep: Keep, context: Context = OWN
    ) -> tuple[Float[Array, "B S D"], Routing | None]:
        """Returns the block's output and the choice of experts; `context` is what all layers share of it."""
        routing = self.mixture.route(self.router, x, context)
        y = self.mixture.apply(self.project, enter_split(x), routing, keep)
        return leave_split(y), routing

    def project(self, x: Float[Array, "B S D"], routing: Routing | None, keep: Keep) -> Float[Array, "B S D"]:
        """Returns the SwiGLU of `x`; in a region, this device's part of a sum."""
        gate = self.gate_proj(x, routing, keep.get("gate_proj"))
        up = self.up_proj(x, routing, keep.get("up_proj"))
        return self.down_proj(jax.nn.silu(gate) * up, routing, keep.get("down_proj"))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP. All parameters may have a leading layer axis."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: Adapters):
        self.attention_norm = RMSNorm(declare, arch.width, arch.norm_eps)
        self.attention = Attention(declare, arch, adapters)
        self.mlp_norm = RMSNorm(declare, arch.width, arch.norm_eps)
        self.mlp = Mlp(declare, arch, adapters)

    def keep(self, key: PRNGKeyArray | None, rows: int, length: int) -> Keep:
        """Draws the dropout of a whole batch: outside of regions, so that it does not depend on the mesh."""
        if key is None:
            return {}
        drawn: Keep = {}
        for block, block_key in zip((self.attention, self.mlp), jax.random.split(key), strict=True):
            projections = block.projections
            for (name, one), name_key in zip(
                projections.items(), jax.random.split(block_key, len(projections)), strict=True
            ):
                drawn[name] = None if one.adapter is None else one.adapter.keep(name_key, rows, length)
        return drawn

    def __call__(
        self, x: Float[Array, "B S D"], frame: Frame, kv_cache: KeysValues | None, keep: Keep
    ) -> tuple[Float[Array, "B S D"], RouterUse | None, KeysValues | None]:
        y, kv_cache = self.attention(self.attention_norm(x), frame, kv_cache, keep)
        x = x + y
        y, routing = self.mlp(self.mlp_norm(x), keep, frame.routing)
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
"""The named axis along which each projection's input is cut in a region."""


class Decoder(nnx.Module):
    """Embedding, L scanned layers, final norm and head. The mixture of its adapters decides how experts are chosen."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: Adapters):
        declare = declare.of(DecoderParam)
        self.embedding = declare((arch.vocab, arch.width), ("vocab", "embed"), normal(0.02))
        self.layers = DecoderLayer(declare.layers(arch.layers), arch, adapters)
        self.mixture = adapters.mixture
        self.router = self.mixture.shared_router(declare, arch.width)
        self.norm = RMSNorm(declare, arch.width, arch.norm_eps)
        self.head = None if arch.tied_head else Linear(declare, arch.width, arch.vocab, ("embed", "vocab"))
        self.arch = arch

    def embed(self, tokens: Int[Array, "B S"], dtype: jnp.dtype) -> Float[Array, "B S D"]:
        # Made whole along fsdp first; otherwise every device would look up the rows of all devices.
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
        """Returns the normed hidden states and, with `segments` > 0, the use of the experts in each segment.

        A token sees the tokens of its own segment up to itself. Segments are numbered from 1 in each row and 0 is
        padding; `segments` is the highest number possible. `classes` (one-hot; all zero counts nowhere) sums the use
        over K classes of tokens instead of segments. `key` turns dropout on.

        Raises:
            UserError: the routers need `hints` and there are none.
        """
        if classes is None and segments:
            classes = jax.nn.one_hot(segment_ids - 1, segments, dtype=jnp.float32)
        context = self.mixture.context(x, segment_ids, hints, self.router)
        frame = Frame(rotations(positions, self.arch), segment_ids, None, classes, context)
        x, use, _ = self._scan(x, frame, None, key, remat)
        return x, use

    def cached(
        self, x: Float[Array, "B S D"], cache: Cache, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Continues the rows in `cache` by S tokens, of which the first `lengths` of each row are real.

        What is written past a row's length is never seen, and the next call overwrites it.

        Raises:
            UserError: the routers need what a question does not tell.
        """
        offsets = jnp.arange(x.shape[1])
        positions = cache.length[:, None] + offsets
        real = jnp.broadcast_to(offsets < lengths[:, None], x.shape[:2])
        context, memory = self.mixture.continued(
            x, cache.memory, first=cache.length == 0, real=real, shared=self.router
        )
        frame = Frame(rotations(positions, self.arch), None, cache.length, None, context)
        x, _, layers = self._scan(x, frame, (cache.k, cache.v), None, "none")
        assert layers is not None
        return x, Cache(*layers, cache.length + lengths, memory)

    def empty_cache(self, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        """Returns a cache without tokens that has room for `slots` tokens a row."""
        shape = (self.arch.layers, rows, slots, self.arch.kv_heads, self.arch.head_dim)
        k, v = (constrain(jnp.zeros(shape, dtype), "layers", "batch", None, "kv_heads", None) for _ in range(2))
        length = constrain(jnp.zeros(rows, jnp.int32), "batch")
        return Cache(k, v, length, self.mixture.memory(rows, self.arch.width))

    def head_matrix(self, dtype: jnp.dtype) -> Float[Array, "D V"]:
        """Returns the head's matrix, made whole along fsdp."""
        kernel = self.embedding[...].T if self.head is None else self.head.kernel[...]
        return constrain(kernel.astype(dtype), None, "vocab")

    def logits(self, x: Float[Array, "*B D"], matrix: Float[Array, "D V"] | None = None) -> Float[Array, "*B V"]:
        """Returns float32 logits of normed hidden states; `matrix` is `head_matrix`, if it is at hand."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        matrix = self.head_matrix(x.dtype) if matrix is None else matrix
        logits = jnp.matmul(x, matrix, preferred_element_type=wide)
        return constrain(logits, "batch", *(None,) * (x.ndim - 2), "vocab")

    def _scan(
        self, x: Array, frame: Frame, kv: KeysValues | None, key: PRNGKeyArray | None, remat: Remat
    ) -> tuple[Array, RouterUse | None, KeysValues | None]:
        """Runs all layers and the final norm; returns also the use of the experts and the cache, layers stacked."""
        graph, state = nnx.split(self.layers)
        weights = jax.tree.map(lambda p: p[...], state, is_leaf=lambda p: isinstance(p, Parameter))
        specs = jax.tree.map(layer_specs, state, is_leaf=lambda p: isinstance(p, Parameter))
        keys = None if key is None else jax.random.split(key, self.arch.layers)
        rows, cache_spec = partition("batch"), partition("batch", None, "kv_heads", None)

        def run(weights: Any, x: Array, frame: Frame, kv: KeysValues | None, keep: Keep):
            return nnx.merge(graph, weights)(x, frame, kv, keep)

        def layer(x: Array, inputs: tuple):
            weights, kv, key = inputs
            keep = nnx.merge(graph, weights).keep(key, *x.shape[:2])
            keep_specs = {name: partition("batch", None, PROJECTIONS[name]) for name in keep}
            x, use, kv = in_region(
                run,
                weights,
                specs,
                arguments=(constrain(x, "batch"), frame, kv, keep),
                specs=(rows, Frame.specs(), cache_spec, keep_specs),
                out_specs=(rows, rows, cache_spec),
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
