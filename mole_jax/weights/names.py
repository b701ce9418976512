"""The names of LLaVA's parameters: ours, Hugging Face's, and what lies between the two.

Our parameters are a nested dict of arrays; a leaf's path joins its keys with "/". Layers are stacked on a
leading axis, kernels are (in, out). Hugging Face keeps one tensor a layer and kernels as (out, in).

Four key layouts of Hugging Face LLaVA files exist (all read, the first written):

==================  ===========================================  ==========================================
hub, legacy         ``language_model.model.*``,                  ``vision_tower.vision_model.*``
                    ``language_model.lm_head.*``
transformers 4.5x   ``model.language_model.*``, ``lm_head.*``    ``model.vision_tower.vision_model.*``
transformers 5.x    ``language_model.model.*``,                  ``vision_tower.*``
                    ``language_model.lm_head.*``
module names        ``model.language_model.*``, ``lm_head.*``    ``model.vision_tower.*``
==================  ===========================================  ==========================================
"""

from __future__ import annotations

import dataclasses
import re

from mole_jax.model.architecture import LlavaArchitecture

# How our axes are taken from the foreign tensor's: ours.shape[i] = foreign.shape[permutation[i]].
_TRANSPOSE = (1, 0)  # (out, in) -> (in, out)
_CONV = (2, 3, 1, 0)  # (Dv, 3, P, P) -> (P, P, 3, Dv)

_VISION = "vision_tower.vision_model."
_PROJECTOR = "multi_modal_projector."
_DECODER = "language_model.model."
_HEAD = "language_model.lm_head.weight"

# Axis letters: Lv, Dv, Fv layers, width and MLP width of the vision tower; P patch side in pixels, N+1 patches and the
# class token; L, D, F, V of the decoder; HC and KC heads and key/value heads times head width.
# Our path, axes of one layer, foreign name after the prefix, permutation (None: as it is).
_Row = tuple[str, str, str, tuple[int, ...] | None]


def _affine(path: str, axis: str, name: str) -> tuple[_Row, _Row]:
    return (path + "/scale", axis, name + ".weight", None), (path + "/bias", axis, name + ".bias", None)


def _linear(path: str, axes: str, name: str) -> tuple[_Row, _Row]:
    out = axes.split()[1]
    return (path + "/kernel", axes, name + ".weight", _TRANSPOSE), (path + "/bias", out, name + ".bias", None)


def _kernel(path: str, axes: str, name: str) -> tuple[_Row]:
    return ((path + "/kernel", axes, name + ".weight", _TRANSPOSE),)


TABLE: tuple[_Row, ...] = (
    ("vision/class_embedding", "Dv", _VISION + "embeddings.class_embedding", None),
    ("vision/patch_embedding", "P P 3 Dv", _VISION + "embeddings.patch_embedding.weight", _CONV),
    ("vision/position_embedding", "N+1 Dv", _VISION + "embeddings.position_embedding.weight", None),
    *_affine("vision/pre_norm", "Dv", _VISION + "pre_layrnorm"),  # the misspelling is theirs
    *_affine("vision/layers/norm1", "Dv", _VISION + "encoder.layers.{layer}.layer_norm1"),
    *_linear("vision/layers/attention/q_proj", "Dv Dv", _VISION + "encoder.layers.{layer}.self_attn.q_proj"),
    *_linear("vision/layers/attention/k_proj", "Dv Dv", _VISION + "encoder.layers.{layer}.self_attn.k_proj"),
    *_linear("vision/layers/attention/v_proj", "Dv Dv", _VISION + "encoder.layers.{layer}.self_attn.v_proj"),
    *_linear("vision/layers/attention/o_proj", "Dv Dv", _VISION + "encoder.layers.{layer}.self_attn.out_proj"),
    *_affine("vision/layers/norm2", "Dv", _VISION + "encoder.layers.{layer}.layer_norm2"),
    *_linear("vision/layers/mlp/fc1", "Dv Fv", _VISION + "encoder.layers.{layer}.mlp.fc1"),
    *_linear("vision/layers/mlp/fc2", "Fv Dv", _VISION + "encoder.layers.{layer}.mlp.fc2"),
    *_affine("vision/post_norm", "Dv", _VISION + "post_layernorm"),
    *_linear("projector/linear_1", "Dv D", _PROJECTOR + "linear_1"),
    *_linear("projector/linear_2", "D D", _PROJECTOR + "linear_2"),
    ("decoder/embedding", "V D", _DECODER + "embed_tokens.weight", None),
    ("decoder/layers/attention_norm/scale", "D", _DECODER + "layers.{layer}.input_layernorm.weight", None),
    *_kernel("decoder/layers/attention/q_proj", "D HC", _DECODER + "layers.{layer}.self_attn.q_proj"),
    *_kernel("decoder/layers/attention/k_proj", "D KC", _DECODER + "layers.{layer}.self_attn.k_proj"),
    *_kernel("decoder/layers/attention/v_proj", "D KC", _DECODER + "layers.{layer}.self_attn.v_proj"),
    *_kernel("decoder/layers/attention/o_proj", "HC D", _DECODER + "layers.{layer}.self_attn.o_proj"),
    ("decoder/layers/mlp_norm/scale", "D", _DECODER + "layers.{layer}.post_attention_layernorm.weight", None),
    *_kernel("decoder/layers/mlp/gate_proj", "D F", _DECODER + "layers.{layer}.mlp.gate_proj"),
    *_kernel("decoder/layers/mlp/up_proj", "D F", _DECODER + "layers.{layer}.mlp.up_proj"),
    *_kernel("decoder/layers/mlp/down_proj", "F D", _DECODER + "layers.{layer}.mlp.down_proj"),
    ("decoder/norm/scale", "D", _DECODER + "norm.weight", None),
    ("decoder/head/kernel", "D V", _HEAD, _TRANSPOSE),
)

# Tensors that some versions saved though they hold nothing learned: they are computed from the config.
_IGNORED = re.compile(r"(embeddings\.position_ids|rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached)$")


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """One leaf of our parameters and the foreign tensors that it is made of."""

    path: str
    """Our path, keys joined by "/"."""
    shape: tuple[int, ...]
    """Our shape, with the layer axis in front where `stacked`."""
    pattern: str
    """Canonical foreign name, with ``{layer}`` where `stacked`."""
    permutation: tuple[int, ...]
    """Axis of the foreign tensor for each of our axes of one layer."""

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.pattern

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical foreign names, by layer; a single one where the leaf is not stacked."""
        if not self.stacked:
            return (self.pattern,)
        return tuple(self.pattern.format(layer=layer) for layer in range(self.shape[0]))

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """Shape of each foreign tensor."""
        ours = self.shape[1:] if self.stacked else self.shape
        foreign = [0] * len(ours)
        for axis, source in enumerate(self.permutation):
            foreign[source] = ours[axis]
        return tuple(foreign)

    @property
    def inverse(self) -> tuple[int, ...]:
        """Permutation that takes one layer of ours back to the foreign axes."""
        return tuple(self.permutation.index(axis) for axis in range(len(self.permutation)))


def leaf_specs(arch: LlavaArchitecture) -> dict[str, LeafSpec]:
    """Returns every leaf of `arch` that has a foreign name, by path, in the order in which files are written.

    Image start and end vectors have none; a tied head has no leaf.
    """
    vision, decoder = arch.vision, arch.decoder
    sizes = {
        "3": 3,
        "P": vision.patch_size,
        "N+1": vision.patches + 1,
        "Dv": vision.width,
        "Fv": vision.mlp_width,
        "D": decoder.width,
        "F": decoder.mlp_width,
        "V": decoder.vocab,
        "HC": decoder.heads * decoder.head_dim,
        "KC": decoder.kv_heads * decoder.head_dim,
    }
    specs = {}
    for path, axes, pattern, permutation in TABLE:
        if pattern == _HEAD and decoder.tied_head:
            continue
        shape = tuple(sizes[axis] for axis in axes.split())
        permutation = permutation or tuple(range(len(shape)))
        if "{layer}" in pattern:
            shape = (vision.layers if pattern.startswith(_VISION) else decoder.layers, *shape)
        specs[path] = LeafSpec(path, shape, pattern, permutation)
    return specs


def canonical(name: str) -> str:
    """Returns a Hugging Face tensor name of any of the four layouts as the hub's legacy layout has it."""
    if name.startswith(("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.")):
        name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith(_VISION):
        return _VISION + name.removeprefix("vision_tower.")
    if name == "lm_head.weight":
        return _HEAD
    if name.startswith("language_model.") and not name.startswith((_DECODER, "language_model.lm_head.")):
        return _DECODER + name.removeprefix("language_model.")
    return name


def ignored(name: str, arch: LlavaArchitecture) -> bool:
    """Tells whether a canonical name is known to carry nothing: computed buffers, and the head where it is tied."""
    return bool(_IGNORED.search(name)) or (arch.decoder.tied_head and name == _HEAD)
