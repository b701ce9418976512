"""LLaVA: vision tower, projector and decoder joined."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from mole_jax.adapters.balance import RouterUse
from mole_jax.adapters.build import Adapters
from mole_jax.adapters.mixture import Hints
from mole_jax.config import AttentionKernel, Remat
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.decoder import Decoder
from mole_jax.model.layers import Linear
from mole_jax.model.vision import VisionTower, normalise
from mole_jax.parameters import Declare, DecoderParam, ProjectorParam, normal

FLOAT32 = jnp.dtype("float32")


class Projector(nnx.Module):
    """Linear, exact GELU, Linear: from vision width to decoder width."""

    def __init__(self, declare: Declare, d_in: int, d_out: int):
        declare = declare.of(ProjectorParam)
        self.linear_1 = Linear(declare, d_in, d_out, ("embed", "mlp"), bias=True)
        self.linear_2 = Linear(declare, d_out, d_out, ("mlp", "embed"), bias=True)

    def __call__(self, x: Float[Array, "N P I"]) -> Float[Array, "N P D"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))


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
        self.vision = VisionTower(declare, arch.vision)
        self.projector = Projector(declare, arch.vision.width, arch.decoder.width)
        self.image_vectors = ImageVectors(declare, arch.decoder.width) if arch.image_vectors else None
        self.decoder = Decoder(declare, arch.decoder, adapters)
        self.arch = arch

    def image_features(
        self, pixels: Float[Array, "N H W 3"], remat: Remat = "none", kernel: AttentionKernel = "auto"
    ) -> Float[Array, "N P D"]:
        """Returns each image's `arch.image_span` vectors for the token row, from normalised pixels."""
        hidden = self.vision(pixels, self.arch.feature_layer, remat, kernel)
        features = self.projector(hidden[:, 1:] if self.arch.feature_select == "patch" else hidden)
        return features if self.image_vectors is None else self.image_vectors(features)

    def embed(
        self,
        tokens: Int[Array, "B S"],
        images: UInt8[Array, "B M H W 3"] | Float[Array, "B M H W 3"],
        dtype: jnp.dtype,
        remat: Remat = "none",
        kernel: AttentionKernel = "auto",
    ) -> Float[Array, "B S D"]:
        """Embeds the tokens and puts the features of each row's images, in order, into the row's image positions.

        8-bit images are normalised here; floating-point images must be normalised already. A batch without image
        positions does not run the vision tower.
        """
        x = self.decoder.embed(tokens, dtype)
        rows, slots = images.shape[:2]
        if slots == 0:
            return x
        is_image = tokens == self.arch.image_token_id

        def see(images: Array) -> Array:
            flat = images.reshape(rows * slots, *images.shape[2:])
            pixels = normalise(flat, dtype) if flat.dtype == jnp.uint8 else flat.astype(dtype)
            return self.image_features(pixels, remat, kernel).reshape(rows, slots * self.arch.image_span, x.shape[-1])

        def skip(images: Array) -> Array:
            return jnp.zeros((rows, slots * self.arch.image_span, x.shape[-1]), dtype)

        features = jax.lax.cond(is_image.any(), see, skip, images)
        source = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
        return jnp.where(is_image[..., None], jnp.take_along_axis(features, source[..., None], axis=1), x)

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
    ) -> tuple[Float[Array, "B S D"], RouterUse | None]:
        """Returns the normed last hidden states and the use of the experts; for the arguments see `Decoder`."""
        x = self.embed(tokens, images, dtype, remat, kernel)
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
    ) -> Float[Array, "B S V"]:
        """Returns float32 logits of every position, computed in float32. For `hints` see `Decoder`."""
        return self.decoder.logits(self.hidden(tokens, images, positions, segment_ids, hints=hints)[0])
