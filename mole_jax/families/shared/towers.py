"""The vision towers: ``vision_config`` of CLIP, SigLIP and InternViT, to and from ours, and their tensors' names."""

from __future__ import annotations

from typing import Any

from mole_jax.errors import UserError
from mole_jax.families.shared.names import CONV, Row, affine, linear
from mole_jax.families.shared.section import Section
from mole_jax.model.architecture import VisionArchitecture

# transformers' own defaults, for fields that a vision_config leaves out.
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP |= {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP = CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
INTERNVIT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
INTERNVIT |= {"image_size": 448, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_TEXT_TOO = ("projection_dim", "vocab_size", "logit_scale_init_value")
"""Of the contrastive model that a tower was trained in."""


def clip_from_hf(values: Any, where: str) -> VisionArchitecture:
    """Reads a CLIP's config; raises `UserError` for what is malformed, not supported or not known."""
    section = Section(values, where, CLIP)
    section.only("model_type", "clip_vision_model")
    vision = _tower(section, {"activation": _activation(section, "quick_gelu", "gelu", "gelu_pytorch_tanh")})
    section.check_all_read(*_TEXT_TOO)
    return vision


def siglip_from_hf(
    values: Any, where: str, *, defaults: dict[str, Any] = SIGLIP, **settings: Any
) -> VisionArchitecture:
    """Reads a SigLIP's config; `settings` are fields of ours that follow from how a family uses it.

    Raises:
        UserError: something is malformed, not supported or not known.
    """
    section = Section(values, where, defaults)
    section.get("model_type")  # the caller has looked at it
    own = {
        "activation": _activation(section, "gelu_pytorch_tanh", "gelu", "quick_gelu"),
        "class_token": False,
        "patch_bias": True,
        "pre_norm": False,
    }
    vision = _tower(section, own | settings)
    # The head pools all patches into one vector, which no family uses.
    section.check_all_read(*_TEXT_TOO, "vision_use_head")
    return vision


def internvit_from_hf(values: Any, where: str, *, last_layer: bool) -> VisionArchitecture:
    """Reads an InternViT's config; `last_layer`: features are asked for by the number -1.

    Raises:
        UserError: something is malformed, not supported or not known.
    """
    section = Section(values, where, INTERNVIT)
    section.only("model_type", "internvl_vision")
    section.only("use_absolute_position_embeddings", True)
    section.only("use_mask_token", False)
    pooled = section.only("use_mean_pooling", True, False)
    own = {
        "activation": _activation(section, "gelu", "gelu_pytorch_tanh", "quick_gelu"),
        "patch_bias": True,
        "pre_norm": False,
        "post_norm": "none" if pooled else "applied" if last_layer else "kept",
        "norm": "rms" if section.only("norm_type", "layer_norm", "rms_norm") == "rms_norm" else "layer",
        "qkv_bias": section.only("attention_bias", False, True),
        "qk_norm": section.only("use_qk_norm", False, True),
        "layer_scale": True,
    }
    vision = _tower(section, own)
    section.check_all_read()
    return vision


def _activation(section: Section, *supported: str) -> str:
    return _ACTIVATIONS[section.only("hidden_act", *supported, default=section.defaults["hidden_act"])]


def _tower(section: Section, own: dict[str, Any]) -> VisionArchitecture:
    section.only("num_channels", 3)
    vision = VisionArchitecture(
        width=section.integer("hidden_size"),
        mlp_width=section.integer("intermediate_size"),
        layers=section.integer("num_hidden_layers"),
        heads=section.integer("num_attention_heads"),
        image_size=section.square("image_size"),
        patch_size=section.square("patch_size"),
        norm_eps=section.number("layer_norm_eps"),
        **own,
    )
    where = section.where
    if vision.width % vision.heads:
        raise UserError(f"{where}: 'hidden_size' {vision.width} does not divide into {vision.heads} heads")
    if vision.image_size < vision.patch_size:
        raise UserError(f"{where}: 'image_size' {vision.image_size} is smaller than a patch of {vision.patch_size}")
    return vision


def is_clip(vision: VisionArchitecture) -> bool:
    """Tells whether a tower of the one table of CLIP and SigLIP is the first."""
    return vision.class_token


def vit_to_hf(vision: VisionArchitecture) -> dict[str, Any]:
    """Returns the ``vision_config`` of a CLIP or a SigLIP."""
    common = _common_to_hf(vision)
    if is_clip(vision):
        return {**common, "model_type": "clip_vision_model"}
    return {**common, "model_type": "siglip_vision_model", "vision_use_head": False}


def internvit_to_hf(vision: VisionArchitecture) -> dict[str, Any]:
    """Returns the ``vision_config`` of an InternViT."""
    return {
        **_common_to_hf(vision),
        "attention_bias": vision.qkv_bias,
        "image_size": [vision.image_size] * 2,
        "model_type": "internvl_vision",
        "norm_type": "rms_norm" if vision.norm == "rms" else "layer_norm",
        "patch_size": [vision.patch_size] * 2,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": vision.post_norm == "none",
        "use_qk_norm": vision.qk_norm,
    }


def _common_to_hf(vision: VisionArchitecture) -> dict[str, Any]:
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    return {
        "hidden_act": theirs[vision.activation],
        "hidden_size": vision.width,
        "image_size": vision.image_size,
        "intermediate_size": vision.mlp_width,
        "layer_norm_eps": vision.norm_eps,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "num_hidden_layers": vision.layers,
        "patch_size": vision.patch_size,
    }


def vit_rows(vision: VisionArchitecture, prefix: str) -> tuple[Row, ...]:
    """Returns the table of a CLIP or a SigLIP; names begin with `prefix`."""
    embeddings, layer, ours = prefix + "embeddings.", prefix + "encoder.layers.{layer}.", "vision/layers/"
    class_token = (Row("vision/class_embedding", "Dv", embeddings + "class_embedding"),)
    patch_bias = (Row("vision/patch_bias", "Dv", embeddings + "patch_embedding.bias"),)
    return (
        *(class_token if vision.class_token else ()),
        Row("vision/patch_embedding", "P P 3 Dv", embeddings + "patch_embedding.weight", CONV),
        *(patch_bias if vision.patch_bias else ()),
        Row("vision/position_embedding", "T Dv", embeddings + "position_embedding.weight"),
        *(affine("vision/pre_norm", "Dv", prefix + "pre_layrnorm") if vision.pre_norm else ()),  # spelled as theirs
        *affine(ours + "norm1", "Dv", layer + "layer_norm1"),
        *linear(ours + "attention/q_proj", "Dv Dv", layer + "self_attn.q_proj"),
        *linear(ours + "attention/k_proj", "Dv Dv", layer + "self_attn.k_proj"),
        *linear(ours + "attention/v_proj", "Dv Dv", layer + "self_attn.v_proj"),
        *linear(ours + "attention/o_proj", "Dv Dv", layer + "self_attn.out_proj"),
        *affine(ours + "norm2", "Dv", layer + "layer_norm2"),
        *linear(ours + "mlp/fc1", "Dv Fv", layer + "mlp.fc1"),
        *linear(ours + "mlp/fc2", "Fv Dv", layer + "mlp.fc2"),
        *affine("vision/post_norm", "Dv", prefix + "post_layernorm"),
    )


def internvit_rows(vision: VisionArchitecture, prefix: str) -> tuple[Row, ...]:
    """Returns the table of an InternViT; names begin with `prefix`."""
    embeddings, layer, ours = prefix + "embeddings.", prefix + "encoder.layer.{layer}.", "vision/layers/"
    norm_bias, bias = vision.norm == "layer", vision.qkv_bias
    norms = (
        Row(ours + "attention/q_norm/scale", "Dv", layer + "attention.q_norm.weight"),
        Row(ours + "attention/k_norm/scale", "Dv", layer + "attention.k_norm.weight"),
    )
    return (
        Row("vision/class_embedding", "Dv", embeddings + "cls_token", ones=2),
        Row("vision/patch_embedding", "P P 3 Dv", embeddings + "patch_embeddings.projection.weight", CONV),
        Row("vision/patch_bias", "Dv", embeddings + "patch_embeddings.projection.bias"),
        Row("vision/position_embedding", "T Dv", embeddings + "position_embeddings", ones=1),
        *affine(ours + "norm1", "Dv", layer + "layernorm_before", bias=norm_bias),
        *linear(ours + "attention/q_proj", "Dv Dv", layer + "attention.q_proj", bias=bias),
        *linear(ours + "attention/k_proj", "Dv Dv", layer + "attention.k_proj", bias=bias),
        *linear(ours + "attention/v_proj", "Dv Dv", layer + "attention.v_proj", bias=bias),
        *linear(ours + "attention/o_proj", "Dv Dv", layer + "attention.projection_layer"),
        *(norms if vision.qk_norm else ()),
        Row(ours + "scale1", "Dv", layer + "lambda_1"),
        *affine(ours + "norm2", "Dv", layer + "layernorm_after", bias=norm_bias),
        *linear(ours + "mlp/fc1", "Dv Fv", layer + "mlp.fc1"),
        *linear(ours + "mlp/fc2", "Fv Dv", layer + "mlp.fc2"),
        Row(ours + "scale2", "Dv", layer + "lambda_2"),
        *(affine("vision/post_norm", "Dv", prefix + "layernorm") if vision.post_norm != "none" else ()),
    )
