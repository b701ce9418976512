"""The whole model: vision tower, connector and decoder joined."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from mole_jax.adapters.balance import RouterUse
from mole_jax.adapters.build import Adapters
from mole_jax.adapters.mixture import Hints
from mole_jax.config import AttentionKernel, Remat
from mole_jax.image_spec import NEWLINE, Single
from mole_jax.model.architecture import ConnectorArchitecture, LlavaArchitecture
from mole_jax.model.decoder import Decoder
from mole_jax.model.layers import LayerNorm, Linear
from mole_jax.model.vision import VisionTower, normalise
from mole_jax.parameters import Declare, DecoderParam, ProjectorParam, normal

FLOAT32 = jnp.dtype("float32")
CONNECTOR_NORM_EPS = 1e-5
"""Of InternVL's connector, whose config does not name it."""


class Projector(nnx.Module):
    """The connector: from the tower's features to vectors of the decoder's width."""

    def __init__(self, declare: Declare, arch: ConnectorArchitecture, d_in: int, d_out: int):
        declare, d_in = declare.of(ProjectorParam), d_in * arch.shuffle**2
        self.norm = LayerNorm(declare, d_in, CONNECTOR_NORM_EPS) if arch.norm else None
        self.linear_1 = Linear(declare, d_in, d_out, ("embed", "mlp"), bias=arch.bias)
        self.linear_2 = Linear(declare, d_out, d_out, ("mlp", "embed"), bias=arch.bias) if arch.layers == 2 else None
        self.shuffle = arch.shuffle

    def __call__(self, x: Float[Array, "N P I"]) -> Float[Array, "N T D"]:
        x = x if self.shuffle == 1 else shuffled(x, self.shuffle)
        x = x if self.norm is None else self.norm(x)
        x = self.linear_1(x)
        return x if self.linear_2 is None else self.linear_2(jax.nn.gelu(x, approximate=False))


def shuffled(x: Float[Array, "N P I"], factor: int) -> Float[Array, "N P/factor^2 I*factor^2"]:
    """Joins the channels of each square of `factor` x `factor` patches, row by row; patches and squares are in rows."""
    images, patches, channels = x.shape
    side = math.isqrt(patches) // factor
    squares = x.reshape(images, side, factor, side, factor, channels).swapaxes(2, 3)
    return squares.reshape(images, side * side, factor * factor * channels)


class ImageVectors(nnx.Module):
    """Learned vectors before and after an image's features (released LLaVA-MoLE)."""

    def __init__(self, declare: Declare, width: int):
        declare = declare.of(ProjectorParam)
        self.start = declare((width,), ("width",), normal(width**-0.5))
        self.end = declare((width,), ("width",), normal(width**-0.5))

    def __call__(self, features: Float[Array, "N P D"]) -> Float[Array, "N P+2 D"]:
        ends = (
            jnp.broadcast_to(v[...].astype(features.dtype), (len(features), 1, v.shape[-1]))
            for v in (self.start, self.end)
        )
        first, last = ends
        return jnp.concatenate([first, features, last], axis=1)


class Llava(nnx.Module):
    """The whole model. Positions that hold `arch.image_token_id` in the token rows receive image features."""

    def __init__(self, arch: LlavaArchitecture, adapters: Adapters, rngs: nnx.Rngs):
        declare = Declare(DecoderParam, rngs)
        self.vision = VisionTower(declare, arch.vision, adapters)
        width = arch.decoder.width
        self.projector = Projector(declare, arch.connector, arch.vision.width, width)
        self.image_vectors = ImageVectors(declare, width) if arch.image_vectors else None
        self.image_newline = (
            declare.of(ProjectorParam)((width,), ("width",), normal(width**-0.5)) if arch.image_newline else None
        )
        self.decoder = Decoder(declare, arch.decoder, adapters)
        self.arch = arch

    def image_features(
        self, pixels: Float[Array, "N H W 3"], remat: Remat = "none", kernel: AttentionKernel = "auto"
    ) -> Float[Array, "N P D"]:
        """Returns the `arch.image_span` vectors of each tile, from normalised pixels."""
        hidden = self.vision(pixels, self.arch.feature_layer, remat, kernel)
        drops_class = self.arch.vision.class_token and self.arch.feature_select == "patch"
        features = self.projector(hidden[:, 1:] if drops_class else hidden)
        return features if self.image_vectors is None else self.image_vectors(features)

    def embed(
        self,
        tokens: Int[Array, "B S"],
        images: UInt8[Array, "B M H W 3"] | Float[Array, "B M H W 3"],
        dtype: jnp.dtype,
        remat: Remat = "none",
        kernel: AttentionKernel = "auto",
        *,
        sources: Int[Array, "B S K"] | None = None,
        weights: Float[Array, "B S K"] | None = None,
        every_slot: bool = False,
    ) -> Float[Array, "B S D"]:
        """Embeds the tokens and puts the features of each row's tiles into the row's image positions.

        8-bit tiles are normalised here; floating-point ones must be normalised already. The tower does not run on
        slots that come after the last one that any row uses; where a picture is a single tile, it runs on all or none.

        Args:
            tokens: image positions are those of `arch.image_token_id`.
            images: M slots a row, those in use first.
            dtype: of the activations.
            remat: what the tower's backward pass computes again.
            kernel: of the tower's attention.
            sources: which K features of its row each image position takes, slot after slot (`arch.image_span` each),
                or `NEWLINE`. None: one after the other.
            weights: their shares. None: 1.
            every_slot: the tower runs on all slots or none, for rows whose slots are nearly all in use.
        """
        x = self.decoder.embed(tokens, dtype)
        if images.shape[1] == 0:
            return x
        is_image = tokens == self.arch.image_token_id
        features = self._features(images, is_image, sources, dtype, remat, kernel, every_slot)
        if sources is None:
            source = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
            seen = jnp.take_along_axis(features, source[..., None], axis=1)
        else:
            seen = self._gathered(features, sources, weights)
        return jnp.where(is_image[..., None], seen, x)

    def _features(
        self,
        images: Array,
        is_image: Bool[Array, "B S"],
        sources: Int[Array, "B S K"] | None,
        dtype: jnp.dtype,
        remat: Remat,
        kernel: AttentionKernel,
        every_slot: bool,
    ) -> Float[Array, "B M*P D"]:
        """Returns the features of each row's tiles; those of slots that are not computed are zero."""
        rows, slots = images.shape[:2]
        span, width = self.arch.image_span, self.arch.decoder.width

        def see(tiles: Array) -> Array:
            eight_bit = tiles.dtype == jnp.uint8
            pixels = normalise(tiles, dtype, self.arch.mean, self.arch.std) if eight_bit else tiles.astype(dtype)
            return self.image_features(pixels, remat, kernel)

        def all_slots(images: Array) -> Array:
            return see(images.reshape(rows * slots, *images.shape[2:])).reshape(rows, slots * span, width)

        def no_slot(images: Array) -> Array:
            return jnp.zeros((rows, slots * span, width), dtype)

        if every_slot or slots == 1 or isinstance(self.arch.tiling, Single):
            return jax.lax.cond(is_image.any(), all_slots, no_slot, images)
        if sources is None:
            used = -(-is_image.sum(axis=1).max() // span)
        else:
            used = jnp.max(jnp.where(is_image[..., None], sources, NEWLINE)) // span + 1

        def slot(_: None, tiles: tuple[Array, Array]) -> tuple[None, Array]:
            number, images = tiles
            return None, jax.lax.cond(number < used, see, lambda _: jnp.zeros((rows, span, width), dtype), images)

        def some_slots(images: Array) -> Array:
            _, features = jax.lax.scan(slot, None, (jnp.arange(slots), images.swapaxes(0, 1)))
            return features.swapaxes(0, 1).reshape(rows, slots * span, width)

        # A full batch runs all slots at once, which reads the tower's weights once.
        return jax.lax.cond(used == slots, all_slots, some_slots, images)

    def _gathered(
        self, features: Float[Array, "B F D"], sources: Int[Array, "B S K"], weights: Float[Array, "B S K"] | None
    ) -> Float[Array, "B S D"]:
        """Returns the weighted sums of each row's features."""

        def taken(source: Int[Array, "B S"]) -> Array:
            one = jnp.take_along_axis(features, jnp.maximum(source, 0)[..., None], axis=1)
            if self.image_newline is None:
                return one
            return jnp.where((source == NEWLINE)[..., None], self.image_newline[...].astype(one.dtype), one)

        if weights is None:
            return _sum(taken(sources[..., k]) for k in range(sources.shape[-1]))
        shares = weights.astype(features.dtype)
        return _sum(shares[..., k, None] * taken(sources[..., k]) for k in range(sources.shape[-1]))

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        images: Array,
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        *,
        dtype: jnp.dtype = FLOAT32,
        segments: int = 0,
        classes: Float[Array, "B S K"] | None = None,
        hints: Hints | None = None,
        key: PRNGKeyArray | None = None,
        remat: Remat = "none",
        kernel: AttentionKernel = "auto",
        sources: Int[Array, "B S K"] | None = None,
        weights: Float[Array, "B S K"] | None = None,
    ) -> tuple[Float[Array, "B S D"], RouterUse | None]:
        """Returns the normed last hidden states and the experts' use; arguments are those of `embed` and `Decoder`."""
        x = self.embed(tokens, images, dtype, remat, kernel, sources=sources, weights=weights)
        return self.decoder(
            x,
            positions,
            segment_ids,
            segments=segments,
            classes=classes,
            hints=hints,
            key=key,
            remat=remat,
            kernel=kernel,
        )

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        images: Array,
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        hints: Hints | None = None,
        *,
        sources: Int[Array, "B S K"] | None = None,
        weights: Float[Array, "B S K"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Returns float32 logits of every position, computed in float32; for the arguments see `hidden`."""
        hidden, _ = self.hidden(tokens, images, positions, segment_ids, hints=hints, sources=sources, weights=weights)
        return self.decoder.logits(hidden)


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)
