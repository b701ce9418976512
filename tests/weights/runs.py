"""Runs' folders with random adapters, and the logits of what is loaded from anywhere."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mole_jax.config import AdapterConfig, MeshConfig
from mole_jax.files import absolute
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import group_of, unflatten
from mole_jax.weights import run
from mole_jax.weights.open import open_source, place

GROUPS = ("adapters", "router", "projector")


def leaves_of(path, *, base=None, trainable=GROUPS):
    """Returns the spec and all arrays of the weights at `path`, in float32."""
    source = open_source(str(path)) if base is None else open_source(str(path), base=str(base))
    spec = ModelSpec.of(source.architecture, source.adapter)
    return spec, host(place(spec, source, make_mesh(MeshConfig(data=1)), trainable, "float32", 0))


def host(leaves):
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def trained_run(folder, base, *, arch=None, spread=0.2, prompt="v1", image_aspect="pad", **adapter):
    """A run's folder as the trainer leaves it, with random adapters on `base`; returns (spec, all arrays)."""
    source = open_source(str(base))
    arch = dataclasses.replace(source.architecture, **(arch or {}))
    settings = AdapterConfig(**{"rank": 3, "alpha": 6.0} | adapter)
    spec = ModelSpec.of(arch, settings)
    leaves = place(spec, source, make_mesh(MeshConfig(data=1)), GROUPS, "float32", 0)
    own = [path for path in leaves if group_of(spec.declarations[path]) in GROUPS]
    key = jax.random.key(7)
    own = {
        path: spread * jax.random.normal(jax.random.fold_in(key, i), leaves[path].shape) for i, path in enumerate(own)
    }
    meta = run.Meta(
        architecture=arch,
        adapter=settings,
        trained=GROUPS,
        prompt=prompt,
        image_aspect=image_aspect,
        base=str(base),
        base_hash=source.content_hash(),
        seed=0,
    )
    run.write_params(absolute(str(folder)), own, meta)
    return spec, host(leaves | own)


def example(arch):
    """Returns tokens (1, S) with one image in the middle, and its normalised pixels (1, 1, H, W, 3)."""
    text = np.random.default_rng(3).integers(3, arch.image_token_id, 24)
    tokens = np.concatenate([[1], text[:8], [arch.image_token_id] * arch.image_span, text[8:]])[None].astype(np.int32)
    side = arch.vision.image_size
    return tokens, np.random.default_rng(4).normal(size=(1, 1, side, side, 3)).astype(np.float32)


def logits(spec, leaves, tokens=None, images=None):
    """Returns the logits (1, S, V) of one row of tokens and its images; by default of `example`."""
    if tokens is None or images is None:
        tokens, images = example(spec.arch)
    model = nnx.merge(spec.graph, unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()}))
    return np.asarray(model(tokens, images, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)))
