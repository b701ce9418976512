"""The vision transformers: CLIP, SigLIP and InternViT, which differ in what `VisionArchitecture` says."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from mole_jax.adapters.build import Adapters
from mole_jax.adapters.kind import Projection
from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.config import AttentionKernel, Remat
from mole_jax.model.architecture import VisionArchitecture
from mole_jax.model.attention import attention
from mole_jax.model.layers import LayerNorm, RMSNorm, rematerialised
from mole_jax.parallel.region import gather_layer
from mole_jax.parallel.sharding import constrain
from mole_jax.parameters import Declare, Parameter, VisionParam, constant, normal, zeros

QK_NORM_EPS = 1e-6
"""Of InternViT, whose config does not name it."""
LAYER_SCALE = 0.1


def normalise(
    images: UInt8[Array, "N H W 3"],
    dtype: jnp.dtype,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> Float[Array, "N H W 3"]:
    """Returns 8-bit pixels less `mean` over `std`, which are of values in [0, 1]."""
    pixels = images.astype(jnp.float32) / 255
    return ((pixels - jnp.array(mean)) / jnp.array(std)).astype(dtype)


def _norm(declare: Declare, arch: VisionArchitecture) -> LayerNorm | RMSNorm:
    kind = LayerNorm if arch.norm == "layer" else RMSNorm
    return kind(declare, arch.width, arch.norm_eps)


class VisionLinear(nnx.Module):
    """``x W + b``, plus the delta of a plain LoRA if there is one."""

    def __init__(self, declare: Declare, adapters: Adapters, projection: Projection, *, bias: bool = True):
        d_in, d_out = projection.d_in, projection.d_out
        self.kernel = declare((d_in, d_out), projection.axes, normal(d_in**-0.5), decay=True)
        self.bias = declare((d_out,), ("width",), zeros) if bias else None
        self.adapter = adapters.vision_projection(declare, projection)

    def __call__(self, x: Float[Array, "N T I"]) -> Float[Array, "N T O"]:
        y = x @ self.kernel[...].astype(x.dtype)
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return y if self.adapter is None else y + self.adapter(x)


class VisionLayer(nnx.Module):
    """Pre-norm attention and MLP. All parameters may have a leading layer axis."""

    def __init__(self, declare: Declare, arch: VisionArchitecture, adapters: Adapters):
        self.norm1 = _norm(declare, arch)
        self.attention = VisionAttention(declare, arch, adapters)
        self.norm2 = _norm(declare, arch)
        self.mlp = VisionMlp(declare, arch, adapters)
        scale = constant(LAYER_SCALE)
        self.scale1 = declare((arch.width,), ("width",), scale) if arch.layer_scale else None
        self.scale2 = declare((arch.width,), ("width",), scale) if arch.layer_scale else None

    def __call__(self, x: Float[Array, "N T D"], kernel: AttentionKernel) -> Float[Array, "N T D"]:
        x = x + _scaled(self.attention(self.norm1(x), kernel), self.scale1)
        return x + _scaled(self.mlp(self.norm2(x)), self.scale2)


def _scaled(x: Float[Array, "N T D"], scale: Parameter | None) -> Float[Array, "N T D"]:
    return x if scale is None else x * scale[...].astype(x.dtype)


class VisionAttention(nnx.Module):
    def __init__(self, declare: Declare, arch: VisionArchitecture, adapters: Adapters):
        width, bias = arch.width, arch.qkv_bias
        q, k, v = (Projection(name, width, width, ("embed", "heads")) for name in ("q_proj", "k_proj", "v_proj"))
        self.q_proj = VisionLinear(declare, adapters, q, bias=bias)
        self.k_proj = VisionLinear(declare, adapters, k, bias=bias)
        self.v_proj = VisionLinear(declare, adapters, v, bias=bias)
        self.o_proj = VisionLinear(declare, adapters, Projection("o_proj", width, width, ("heads", "embed")))
        self.q_norm = RMSNorm(declare, width, QK_NORM_EPS) if arch.qk_norm else None
        self.k_norm = RMSNorm(declare, width, QK_NORM_EPS) if arch.qk_norm else None
        self.head_dim = width // arch.heads

    def __call__(self, x: Float[Array, "N T D"], kernel: AttentionKernel) -> Float[Array, "N T D"]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k = q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
        q, k, v = (one.reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2) for one in (q, k, v))
        return self.o_proj(attention(q, k, v, causal=False, kernel=kernel))


class VisionMlp(nnx.Module):
    def __init__(self, declare: Declare, arch: VisionArchitecture, adapters: Adapters):
        width, mlp = arch.width, arch.mlp_width
        self.fc1 = VisionLinear(declare, adapters, Projection("fc1", width, mlp, ("embed", "mlp")))
        self.fc2 = VisionLinear(declare, adapters, Projection("fc2", mlp, width, ("mlp", "embed")))
        self.activation = arch.activation

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        h = self.fc1(x)
        if self.activation == "quick_gelu":  # CLIP's
            return self.fc2(h * jax.nn.sigmoid(1.702 * h))
        # JAX's default is the one by tanh.
        return self.fc2(jax.nn.gelu(h, approximate=self.activation == "gelu_tanh"))


def fraction_buckets(side: int) -> Int[np.ndarray, " side*side"]:
    """Returns the position of each patch of a whole picture, in rows, as SmolVLM chooses it (`VisionArchitecture`)."""
    step = 1 / side
    begins = np.arange(side, dtype=np.float32) * (np.float32(1) / np.float32(side))
    boundaries = (step + np.arange(math.ceil((1 - step) / step)) * step).astype(np.float32)
    buckets = np.searchsorted(boundaries, np.minimum(begins, np.float32(1 - 1e-6)), side="right")
    return (buckets[:, None] * side + buckets).reshape(-1)


class VisionTower(nnx.Module):
    """Patch and position embedding, L layers, and the norms before and after them that the architecture has."""

    def __init__(self, declare: Declare, arch: VisionArchitecture, adapters: Adapters):
        declare = declare.of(VisionParam)
        width, patch = arch.width, arch.patch_size
        self.class_embedding = declare((width,), ("width",), normal(width**-0.5)) if arch.class_token else None
        self.patch_embedding = declare(
            (patch, patch, 3, width), ("patch", "patch", "channel", "embed"), normal((3 * patch**2) ** -0.5), decay=True
        )
        self.patch_bias = declare((width,), ("width",), zeros) if arch.patch_bias else None
        self.position_embedding = declare((arch.tokens, width), ("patch", "embed"), normal(0.02))
        self.pre_norm = LayerNorm(declare, width, arch.norm_eps) if arch.pre_norm else None
        self.layers = VisionLayer(declare.layers(arch.layers), arch, adapters)
        self.post_norm = LayerNorm(declare, width, arch.norm_eps) if arch.post_norm != "none" else None
        self.arch = arch

    def __call__(
        self,
        pixels: Float[Array, "N H W 3"],
        feature_layer: int,
        remat: Remat = "none",
        kernel: AttentionKernel = "auto",
    ) -> Float[Array, "N T D"]:
        """Returns one hidden state; 0 is the embeddings, -1 the last layer (as in transformers).

        Its T vectors are the patches in rows, after the class token if there is one.
        """
        x = self.embed(pixels)
        # Without this the partitioner would keep the weights split and sum activations of all images over fsdp.
        x = constrain(x if self.pre_norm is None else self.pre_norm(x), "batch")
        depth = feature_layer if feature_layer >= 0 else self.arch.layers + 1 + feature_layer
        graph, state = nnx.split(self.layers)
        needed = jax.tree.map(lambda p: p[:depth], state, is_leaf=lambda p: isinstance(p, Parameter))
        axes = jax.tree.map(lambda p: p.get_metadata("axes")[1:], state, is_leaf=lambda p: isinstance(p, Parameter))

        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            whole = jax.tree.map(lambda leaf, names: gather_layer(leaf, *names), weights, axes)
            return constrain(nnx.merge(graph, whole)(x, kernel), "batch"), None

        x = jax.lax.scan(rematerialised(layer, remat), x, needed)[0]
        applied = self.arch.post_norm == "applied" and depth == self.arch.layers
        return self.post_norm(x) if applied and self.post_norm is not None else x

    def embed(self, pixels: Float[Array, "N H W 3"]) -> Float[Array, "N T D"]:
        patch, side = self.arch.patch_size, self.arch.grid
        dtype = pixels.dtype
        grid = pixels[:, : side * patch, : side * patch].reshape(-1, side, patch, side, patch, 3)
        kernel = gather_layer(self.patch_embedding[...], "patch", "patch", "channel", "embed")
        patches = jnp.einsum("nhpwqc,pqcd->nhwd", grid, kernel.astype(dtype))
        tokens = patches.reshape(pixels.shape[0], side * side, -1)
        if self.patch_bias is not None:
            tokens = tokens + self.patch_bias[...].astype(dtype)
        if self.class_embedding is not None:
            first = self.class_embedding[...].astype(dtype)
            first = jnp.broadcast_to(first, (tokens.shape[0], 1, tokens.shape[-1]))
            tokens = jnp.concatenate([first, tokens], axis=1)
        positions = constrain(self.position_embedding[...], None, None)
        if self.arch.fractional_positions:
            positions = positions[fraction_buckets(side)]
        return tokens + positions.astype(dtype)
