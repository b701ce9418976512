"""The decoder of Llama and its kin, with room for adapters at every projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mole_jax.adapters.balance import RouterUse, router_use
from mole_jax.adapters.build import Adapters
from mole_jax.adapters.dropout import Draw, draw, dropout
from mole_jax.adapters.kind import Projection
from mole_jax.adapters.mixture import OWN, Context, Hints
from mole_jax.adapters.router import Routing
from mole_jax.config import AttentionKernel, Remat
from mole_jax.model.architecture import DecoderArchitecture
from mole_jax.model.attention import attention
from mole_jax.model.cached_attention import LayerCache, cached_attention
from mole_jax.model.kernels.saved import PROJECTED, QUERIES_KEYS_VALUES
from mole_jax.model.layers import Linear, RMSNorm, once, rematerialised, swiglu
from mole_jax.model.quantised import layer_specs, product
from mole_jax.model.rotary import rotate, rotations
from mole_jax.parallel.region import enter_split, in_region, leave_split
from mole_jax.parallel.sharding import constrain, partition
from mole_jax.parameters import Declare, DecoderParam, Parameter, normal, zeros

CACHE_AXES = ("layers", "batch", None, "kv_heads")
"""Named axes of the cache's keys and values."""


class Cache(NamedTuple):
    """Keys and values of the tokens so far, with all layers stacked. Rows come and go: each has its own length."""

    k: Float[Array, "L B T K*C"]
    v: Float[Array, "L B T K*C"]
    length: Int[Array, " B"]
    """Slots in use, per row."""
    memory: Float[Array, "B P"]
    """What the mixture remembers of each row's prompt; P may be 0."""

    def emptied(self, rows: Bool[Array, " B"]) -> Cache:
        """Returns the cache with these rows free for other prompts; `Decoder.cached` fills them."""
        return self._replace(length=jnp.where(rows, 0, self.length))


class Frame(NamedTuple):
    """What every layer of one forward pass shares."""

    rotation: Float[Array, "2 B 1 S C/2"]
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
    """A frozen projection ``x W + b`` plus the delta of its adapter, if it has one."""

    def __init__(self, declare: Declare, adapters: Adapters, projection: Projection, *, bias: bool = False):
        d_in, d_out = projection.d_in, projection.d_out
        self.kernel = declare((d_in, d_out), projection.axes, normal(d_in**-0.5), decay=True)
        self.bias = declare((d_out,), projection.axes[1:], zeros) if bias else None
        self.adapter = adapters.projection(declare, projection)

    def __call__(
        self,
        x: Float[Array, "B S I"],
        dropped: Float[Array, "B S I"],
        routing: Routing | None = None,
        width: int | None = None,
    ) -> Float[Array, "B S O"] | Float[Array, "B H S C"]:
        """Returns the output, cut into heads if `width` is given; the adapter alone sees the input after dropout."""
        y = product(x, self.kernel, width)
        if self.bias is not None:
            b = self.bias[...].astype(x.dtype)
            y = y + (b if width is None else b.reshape(-1, 1, width))
        return y if self.adapter is None else y + self.adapter(dropped, routing, width)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions: what comes before and after the attention itself."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: Adapters):
        width, inner, kv = arch.width, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        q, k, v = (
            Projection("q_proj", width, inner, ("embed", "heads")),
            Projection("k_proj", width, kv, ("embed", "kv_heads")),
            Projection("v_proj", width, kv, ("embed", "kv_heads")),
        )
        self.q_proj = AdaptedLinear(declare, adapters, q, bias=arch.qkv_bias)
        self.k_proj = AdaptedLinear(declare, adapters, k, bias=arch.qkv_bias)
        self.v_proj = AdaptedLinear(declare, adapters, v, bias=arch.qkv_bias)
        self.q_norm = RMSNorm(declare, arch.head_dim, arch.norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(declare, arch.head_dim, arch.norm_eps) if arch.qk_norm else None
        self.o_proj = AdaptedLinear(declare, adapters, Projection("o_proj", inner, width, ("heads", "embed")))
        self.head_dim = arch.head_dim


class Mlp(nnx.Module):
    """SwiGLU. A router, if there is one, sees the block's input, and its choice serves all three projections."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: Adapters):
        width, mlp = arch.width, arch.mlp_width
        self.dropout = adapters.config.dropout
        self.mixture = adapters.mixture
        self.router = self.mixture.layer_router(declare, width)
        self.gate_proj = AdaptedLinear(declare, adapters, Projection("gate_proj", width, mlp, ("embed", "mlp")))
        self.up_proj = AdaptedLinear(declare, adapters, Projection("up_proj", width, mlp, ("embed", "mlp")))
        self.down_proj = AdaptedLinear(declare, adapters, Projection("down_proj", mlp, width, ("mlp", "embed")))

    def __call__(
        self, x: Float[Array, "B S D"], drawn: Draw | None = None, context: Context = OWN
    ) -> tuple[Float[Array, "B S D"], Routing | None]:
        """Returns the block's output and the choice of experts; `context` is what all layers share of it."""
        routing = self.mixture.route(self.router, x, context)
        y = self.mixture.apply(self.project, enter_split(x), routing, drawn)
        return leave_split(y), routing

    def project(self, x: Float[Array, "B S D"], routing: Routing | None, drawn: Draw | None) -> Float[Array, "B S D"]:
        """Returns the SwiGLU of `x`; in a region, this device's part of a sum."""
        dropped = dropout(x, self.dropout, drawn, "mlp")
        gate, up = self.gate_proj(x, dropped, routing), self.up_proj(x, dropped, routing)
        gate, up = checkpoint_name((gate, up), PROJECTED)
        hidden = swiglu(gate, up)
        return self.down_proj(hidden, dropout(hidden, self.dropout, drawn, "hidden"), routing)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP. All parameters may have a leading layer axis."""

    def __init__(self, declare: Declare, arch: DecoderArchitecture, adapters: Adapters):
        self.attention_norm = RMSNorm(declare, arch.width, arch.norm_eps)
        self.attention = Attention(declare, arch, adapters)
        self.mlp_norm = RMSNorm(declare, arch.width, arch.norm_eps)
        self.mlp = Mlp(declare, arch, adapters)
        self.dropout = adapters.config.dropout
        self.arch = arch

    def draw(self, key: PRNGKeyArray | None, rows: int, length: int) -> Draw | None:
        """Draws the dropout of a whole batch: outside of regions, so that it does not depend on the mesh."""
        if key is None or self.dropout == 0:
            return None
        arch = self.arch
        widths = dict(zip(INPUTS, (arch.width, arch.heads * arch.head_dim, arch.width, arch.mlp_width), strict=True))
        return draw(key, rows, length, widths)

    def __call__(
        self, x: Float[Array, "B S D"], frame: Frame, drawn: Draw | None, kernel: AttentionKernel
    ) -> tuple[Float[Array, "B S D"], RouterUse | None]:
        rows, heads = partition("batch"), partition("batch", "heads", None, None)
        kv_heads = partition("batch", "kv_heads", None, None)
        # As an activation's channels, whose rows have the first claim on fsdp.
        channels: Any = {name: PartitionSpec(*partition("batch", axis)[1:]) for name, axis in INPUTS.items()}
        draw_specs = None if drawn is None else Draw(rows, channels)  # pyright: ignore[reportArgumentType]
        q, k, v = in_regions(
            self.queries_keys_values,
            self.before_attention,
            (x, frame, drawn),
            (rows, Frame.specs(), draw_specs),
            (heads, kv_heads, kv_heads),
        )
        y = attention(q, k, v, causal=True, segment_ids=frame.segment_ids, kernel=kernel)
        return in_regions(
            self.rest,
            self.after_attention,
            (x, y, frame, drawn),
            (rows, partition("batch", None, "heads"), Frame.specs(), draw_specs),
            (rows, rows),
        )

    def cached(
        self, x: Float[Array, "B S D"], frame: Frame, cache: LayerCache
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """As a call, for tokens that continue a cache; returns the cache with their keys and values in it."""
        assert frame.slots is not None
        heads = self.queries_keys_values(self.before_attention, x, frame, None)
        q, k, v = (one.swapaxes(1, 2) for one in heads)
        cache = cache.write(k, v, frame.slots)
        return self.rest(self.after_attention, x, cached_attention(q, cache, frame.slots), frame, None)[0], cache

    @property
    def before_attention(self) -> Modules:
        block = self.attention
        return self.attention_norm, (block.q_proj, block.k_proj, block.v_proj), (block.q_norm, block.k_norm)

    @property
    def after_attention(self) -> Modules:
        return self.attention.o_proj, self.mlp_norm, self.mlp

    def queries_keys_values(
        self, modules: Modules, x: Float[Array, "B S D"], frame: Frame, drawn: Draw | None
    ) -> tuple[Float[Array, "B H S C"], Float[Array, "B K S C"], Float[Array, "B K S C"]]:
        """Returns rotated queries and keys, and values, of the residual stream `x`."""
        norm, projections, (q_norm, k_norm) = modules
        x = enter_split(once(norm(x)))
        dropped = dropout(x, self.dropout, drawn, "attention")
        q, k, v = (project(x, dropped, width=self.attention.head_dim) for project in projections)
        q, k = q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)
        return checkpoint_name((rotate(q, frame.rotation), rotate(k, frame.rotation), v), QUERIES_KEYS_VALUES)

    def rest(
        self, modules: Modules, x: Float[Array, "B S D"], y: Float[Array, "B S H*C"], frame: Frame, drawn: Draw | None
    ) -> tuple[Float[Array, "B S D"], RouterUse | None]:
        """Returns the residual stream after attention's output `y` and the MLP, and the use of the experts."""
        o_proj, norm, mlp = modules
        y = o_proj(y, dropout(y, self.dropout, drawn, "heads"))
        x = x + leave_split(checkpoint_name(y, PROJECTED))
        y, routing = mlp(once(norm(x)), drawn, frame.routing)
        use = None if routing is None or frame.classes is None else router_use(routing, frame.classes)
        return x + y, use


Modules = tuple[Any, ...]


def in_regions(body: Callable, modules: Modules, arguments: tuple, specs: tuple, out_specs: Any) -> Any:
    """Returns ``body(modules, *arguments)``, run in a region that makes the modules' parameters whole along fsdp."""
    graph, state = nnx.split(modules)

    def each(read: Callable[[Parameter], Any]) -> Any:
        return jax.tree.map(read, state, is_leaf=lambda leaf: isinstance(leaf, Parameter))

    return in_region(
        lambda parameters, *arguments: body(nnx.merge(graph, parameters), *arguments),
        each(lambda parameter: parameter[...]),
        each(layer_specs),
        arguments,
        specs,
        out_specs,
    )


INPUTS: Mapping[str, str] = {"attention": "width", "heads": "heads", "mlp": "width", "hidden": "mlp"}
"""The named axis along which each input of projections (q, k, v; o; gate, up; down) is cut in a region."""


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
        kernel: AttentionKernel = "auto",
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
        return self._scan(x, frame, key, remat, kernel)

    def cached(
        self, x: Float[Array, "B S D"], cache: Cache, lengths: Int[Array, " B"], *, piece: int | None = None
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Continues the rows in `cache` by S tokens, of which the first `lengths` of each row are real.

        What is written past a row's length is never seen, and the next call overwrites it: rows whose length is 0 stay
        as they are. With `piece` no more than so many tokens of a row are in work at once, which bounds the memory.

        Raises:
            UserError: the routers need what a question does not tell.
        """
        real = jnp.arange(x.shape[1]) < lengths[:, None]
        # An empty row that gets a token now begins with its prompt.
        memory = self.mixture.remember(x, cache.memory, first=(cache.length == 0) & (lengths > 0), real=real)
        cache = cache._replace(memory=memory)
        pieces = 1 if piece is None else -(-x.shape[1] // piece)
        if pieces == 1:
            return self._continue(x, cache, lengths)
        size = -(-x.shape[1] // pieces)
        padded = jnp.pad(x, ((0, 0), (0, pieces * size - x.shape[1]), (0, 0)))

        def one(cache: Cache, number: Int[Array, ""]) -> tuple[Cache, Array]:
            start = number * size
            part = jax.lax.dynamic_slice_in_dim(padded, start, size, axis=1)
            hidden, cache = self._continue(part, cache, jnp.clip(lengths - start, 0, size))
            return cache, hidden

        cache, hidden = jax.lax.scan(one, cache, jnp.arange(pieces))
        return hidden.swapaxes(0, 1).reshape(padded.shape)[:, : x.shape[1]], cache

    def _continue(self, x: Array, cache: Cache, lengths: Int[Array, " B"]) -> tuple[Array, Cache]:
        context = self.mixture.continued(x, cache.memory, self.router)
        positions = cache.length[:, None] + jnp.arange(x.shape[1])
        frame = Frame(rotations(positions, self.arch), None, cache.length, None, context)
        x, kv = self._scan_cached(x, frame, (cache.k, cache.v))
        return x, cache._replace(k=kv[0], v=kv[1], length=cache.length + lengths)

    def empty_cache(self, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        """Returns a cache without tokens that has room for `slots` tokens a row."""
        shape = (self.arch.layers, rows, slots, self.arch.kv_heads * self.arch.head_dim)
        k, v = (constrain(jnp.zeros(shape, dtype), *CACHE_AXES) for _ in range(2))
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
        self,
        x: Array,
        frame: Frame,
        key: PRNGKeyArray | None,
        remat: Remat,
        kernel: AttentionKernel,
    ) -> tuple[Array, RouterUse | None]:
        """Runs all layers and the final norm; returns also the use of the experts, layers stacked."""
        graph, weights = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, self.arch.layers)

        def layer(x: Array, inputs: tuple) -> tuple[Array, RouterUse | None]:
            weights, key = inputs
            one = nnx.merge(graph, weights)
            x, use = one(constrain(x, "batch"), frame, one.draw(key, *x.shape[:2]), kernel)
            return constrain(x, "batch"), use

        x, use = jax.lax.scan(rematerialised(layer, remat), x, (weights, keys))
        return self.norm(x), use

    def _scan_cached(self, x: Array, frame: Frame, kv: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        """Runs all layers and the final norm on tokens that continue a cache; returns its keys and values too."""
        graph, weights = nnx.split(self.layers)
        rows, cache_rows = partition("batch"), partition(*CACHE_AXES)
        cache_specs: Any = LayerCache(cache_rows, cache_rows, partition())  # pyright: ignore[reportArgumentType]

        def layer(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            # The cache is carried and written in place; as the scan's input and output it would be there twice.
            x, kv = carry
            weights, number = inputs
            x, cache = in_regions(
                lambda modules, x, frame, cache: modules[0].cached(x, frame, cache),
                (nnx.merge(graph, weights),),
                (constrain(x, "batch"), frame, LayerCache(kv[0], kv[1], number)),
                (rows, Frame.specs(), cache_specs),
                (rows, cache_specs),
            )
            return (constrain(x, "batch"), (cache.k, cache.v)), None

        (x, kv), _ = jax.lax.scan(layer, (x, kv), (weights, jnp.arange(self.arch.layers)))
        return self.norm(x), kv
