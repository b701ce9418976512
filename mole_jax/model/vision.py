"""The CLIP vision transformer, as LLaVA uses it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.config import AttentionKernel, Remat
from mole_jax.model.architecture import VisionArchitecture
from mole_jax.model.attention import attention
from mole_jax.model.layers import LayerNorm, Linear, rematerialised
from mole_jax.parallel.region import gather_layer
from mole_jax.parallel.sharding import constrain
from mole_jax.parameters import Declare, Parameter, VisionParam, normal


def normalise(images: UInt8[Array, "N H W 3"], dtype: jnp.dtype) -> Float[Array, "N H W 3"]:
    """CLIP's normalisation of 8-bit pixels."""
    pixels = images.astype(jnp.float32) / 255
    return ((pixels - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)).astype(dtype)


class VisionLayer(nnx.Module):
    """Pre-norm attention and MLP. All parameters may have a leading layer axis."""

    def __init__(self, declare: Declare, arch: VisionArchitecture):
        width, mlp = arch.width, arch.mlp_width
        self.norm1 = LayerNorm(declare, width, arch.norm_eps)
        self.attention = VisionAttention(declare, arch)
        self.norm2 = LayerNorm(declare, width, arch.norm_eps)
        self.mlp = VisionMlp(declare, width, mlp, arch.activation)

    def __call__(self, x: Float[Array, "N T D"], kernel: AttentionKernel) -> Float[Array, "N T D"]:
        x = x + self.attention(self.norm1(x), kernel)
        return x + self.mlp(self.norm2(x))


class VisionAttention(nnx.Module):
    def __init__(self, declare: Declare, arch: VisionArchitecture):
        width = arch.width
        self.q_proj = Linear(declare, width, width, ("embed", "heads"), bias=True)
        self.k_proj = Linear(declare, width, width, ("embed", "heads"), bias=True)
        self.v_proj = Linear(declare, width, width, ("embed", "heads"), bias=True)
        self.o_proj = Linear(declare, width, width, ("heads", "embed"), bias=True)
        self.head_dim = width // arch.heads

    def __call__(self, x: Float[Array, "N T D"], kernel: AttentionKernel) -> Float[Array, "N T D"]:
        q, k, v = (
            project(x).reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attention(q, k, v, causal=False, kernel=kernel))


class VisionMlp(nnx.Module):
    def __init__(self, declare: Declare, width: int, mlp: int, activation: str):
        self.fc1 = Linear(declare, width, mlp, ("embed", "mlp"), bias=True)
        self.fc2 = Linear(declare, mlp, width, ("mlp", "embed"), bias=True)
        self.activation = activation

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        h = self.fc1(x)
        # CLIP's quick_gelu. "gelu" is the exact one, which is not JAX's default.
        h = h * jax.nn.sigmoid(1.702 * h) if self.activation == "quick_gelu" else jax.nn.gelu(h, approximate=False)
        return self.fc2(h)


class VisionTower(nnx.Module):
    """Patch and position embedding, pre-norm, L layers. `post_norm` is kept only for writing checkpoints back."""

    def __init__(self, declare: Declare, arch: VisionArchitecture):
        declare = declare.of(VisionParam)
        width, patch = arch.width, arch.patch_size
        self.class_embedding = declare((width,), ("width",), normal(width**-0.5))
        self.patch_embedding = declare(
            (patch, patch, 3, width), ("patch", "patch", "channel", "embed"), normal((3 * patch**2) ** -0.5), decay=True
        )
        self.position_embedding = declare((arch.patches + 1, width), ("patch", "embed"), normal(0.02))
        self.pre_norm = LayerNorm(declare, width, arch.norm_eps)
        self.layers = VisionLayer(declare.layers(arch.layers), arch)
        self.post_norm = LayerNorm(declare, width, arch.norm_eps)
        self.arch = arch

    def __call__(
        self,
        pixels: Float[Array, "N H W 3"],
        feature_layer: int,
        remat: Remat = "none",
        kernel: AttentionKernel = "auto",
    ) -> Float[Array, "N P+1 D"]:
        """Returns one hidden state, class token first; 0 is the embeddings, -1 the last layer (as in transformers)."""
        # Without this the partitioner would keep the weights split and sum activations of all images over fsdp.
        x = constrain(self.pre_norm(self.embed(pixels)), "batch")
        depth = feature_layer if feature_layer >= 0 else self.arch.layers + 1 + feature_layer
        graph, state = nnx.split(self.layers)
        needed = jax.tree.map(lambda p: p[:depth], state, is_leaf=lambda p: isinstance(p, Parameter))
        axes = jax.tree.map(lambda p: p.get_metadata("axes")[1:], state, is_leaf=lambda p: isinstance(p, Parameter))

        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            whole = jax.tree.map(lambda leaf, names: gather_layer(leaf, *names), weights, axes)
            return constrain(nnx.merge(graph, whole)(x, kernel), "batch"), None

        return jax.lax.scan(rematerialised(layer, remat), x, needed)[0]

    def embed(self, pixels: Float[Array, "N H W 3"]) -> Float[Array, "N P+1 D"]:
        patch, side = self.arch.patch_size, self.arch.image_size // self.arch.patch_size
        dtype = pixels.dtype
        grid = pixels[:, : side * patch, : side * patch].reshape(-1, side, patch, side, patch, 3)
        kernel = gather_layer(self.patch_embedding[...], "patch", "patch", "channel", "embed")
        patches = jnp.einsum("nhpwqc,pqcd->nhwd", grid, kernel.astype(dtype))
        tokens = patches.reshape(pixels.shape[0], side * side, -1)
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (tokens.shape[0], 1, tokens.shape[-1]))
        positions = constrain(self.position_embedding[...], None, None)
        return jnp.concatenate([first, tokens], axis=1) + positions.astype(dtype)
