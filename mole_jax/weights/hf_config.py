"""Hugging Face's ``config.json`` of a LLaVA, to and from `LlavaArchitecture`.

Missing fields take the defaults of transformers 5 (`LlavaConfig`, `CLIPVisionConfig`, `LlamaConfig`, `MistralConfig`),
so that a file means here what it means there. Whatever the model of this project cannot compute exactly is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mole_jax.errors import UserError
from mole_jax.model.architecture import (
    CLIP_L_336,
    LIMITS,
    DecoderArchitecture,
    LlavaArchitecture,
    RopeScaling,
    VisionArchitecture,
)

# transformers' own defaults, for fields that a config.json leaves out. A missing `vision_config` is CLIP-L-336, but a
# `vision_config` with missing fields is completed as CLIPVisionConfig: CLIP-B/32.
_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP |= {"image_size": 224, "patch_size": 32}
_LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_TEXT = {
    "llama": _LLAMA | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _LLAMA
    | {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
_LIMIT = {
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
"""Our name of a size, whose limit is in `LIMITS`."""
MAX_NUMBER = (1 << 31) - 1
"""Largest of the other whole numbers: ids and positions are of 32 bits."""
_MAX_FLOAT = 1e30
_MAX_IDS = 1_000
_MISSING = object()


class _Section:
    """One object of the config with its place in messages and its defaults."""

    def __init__(self, values: Any, where: str, defaults: Mapping[str, Any] | None = None):
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected an object, found {values!r}")
        self.values, self.where, self.defaults = values, where, defaults or {}

    def get(self, key: str, default: Any = _MISSING) -> Any:
        value = self.values.get(key, _MISSING)
        return self.defaults.get(key, None if default is _MISSING else default) if value is _MISSING else value

    def integer(self, key: str, default: Any = _MISSING, least: int = 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{self.where}: '{key}' is {value!r}, expected a whole number of at least {least}")
        if value > (limit := LIMITS.get(_LIMIT.get(key, ""), MAX_NUMBER)):
            raise UserError(f"{self.where}: '{key}' is {value}, the limit is {limit:,}; the file is damaged")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX_FLOAT:
            raise UserError(f"{self.where}: '{key}' is {value!r}, expected a number over 0 (and under {_MAX_FLOAT:g})")
        return float(value)

    def only(self, key: str, *supported: Any, default: Any = _MISSING) -> Any:
        value = self.get(key, supported[0] if default is _MISSING else default)
        # 1 == True in Python, so types are compared too.
        if not any(value == one and type(value) is type(one) for one in supported):
            words = " or ".join(repr(one) for one in supported)
            raise UserError(f"{self.where}: '{key}' is {value!r}, only {words} is supported")
        return value


def architecture_from_hf(config: dict[str, Any], *, where: str) -> LlavaArchitecture:
    """Reads the content of a LLaVA's config.json, as transformers 4 or 5 writes it.

    Args:
        config: the parsed file.
        where: what messages call it, usually its path.

    Raises:
        UserError: it is not a LLaVA, a value is malformed, or the model has a part that is not supported.
    """
    top = _Section(config, where)
    top.only("model_type", "llava", default=None)
    top.only("projector_hidden_act", "gelu")
    top.only("multimodal_projector_bias", True)
    strategy = top.only("vision_feature_select_strategy", "default", "full")
    layer = top.get("vision_feature_layer", -2)
    vision = _vision(config.get("vision_config"), f"{where}: vision_config")
    if isinstance(layer, bool) or not isinstance(layer, int) or not -vision.layers - 1 <= layer <= vision.layers:
        raise UserError(
            f"{where}: 'vision_feature_layer' is {layer!r}, expected one of the {vision.layers + 1} hidden states"
        )
    image_token_key = "image_token_index" if "image_token_index" in config else "image_token_id"
    decoder = _decoder({} if config.get("text_config") is None else config["text_config"], top)
    return LlavaArchitecture(
        vision,
        decoder,
        image_token_id=top.integer(image_token_key, 32000, least=0),
        feature_layer=layer,
        feature_select="full" if strategy == "full" else "patch",
    )


def _vision(values: Any, where: str) -> VisionArchitecture:
    if values is None:
        return CLIP_L_336
    section = _Section(values, where, _CLIP)
    section.only("model_type", "clip_vision_model")
    section.only("num_channels", 3)
    vision = VisionArchitecture(
        width=section.integer("hidden_size"),
        mlp_width=section.integer("intermediate_size"),
        layers=section.integer("num_hidden_layers"),
        heads=section.integer("num_attention_heads"),
        image_size=section.integer("image_size"),
        patch_size=section.integer("patch_size"),
        norm_eps=section.number("layer_norm_eps", 1e-5),
        activation=section.only("hidden_act", "quick_gelu", "gelu"),
    )
    if vision.width % vision.heads:
        raise UserError(f"{where}: 'hidden_size' {vision.width} does not divide into {vision.heads} heads")
    if vision.image_size < vision.patch_size:
        raise UserError(f"{where}: 'image_size' {vision.image_size} is smaller than a patch of {vision.patch_size}")
    return vision


def _decoder(values: Any, top: _Section) -> DecoderArchitecture:
    where = f"{top.where}: text_config"
    kind = _Section(values, where).only("model_type", *_TEXT)
    section = _Section(values, where, _TEXT[kind])
    section.only("hidden_act", "silu")
    section.only("attention_bias", False)
    section.only("mlp_bias", False)
    heads = section.integer("num_attention_heads")
    width = section.integer("hidden_size")
    # null stands for "derive it" in all three.
    kv_heads = heads if section.get("num_key_value_heads") is None else section.integer("num_key_value_heads")
    head_dim = width // heads if section.get("head_dim") is None else section.integer("head_dim")
    if heads % kv_heads:
        raise UserError(f"{where}: {heads} heads do not divide among {kv_heads} key/value heads")
    max_position = section.integer("max_position_embeddings")
    if section.get("sliding_window") is not None:
        # Within its window a sliding attention is an ordinary one, so sequences end there.
        max_position = min(max_position, section.integer("sliding_window"))
    theta, scaling = _rope(section)
    first, *others = _ids(section, "eos_token_id", 2) or [2]
    pad = section.get("pad_token_id") if section.get("pad_token_id") is not None else top.get("pad_token_id")
    return DecoderArchitecture(
        vocab=section.integer("vocab_size"),
        width=width,
        mlp_width=section.integer("intermediate_size"),
        layers=section.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=section.number("rms_norm_eps", 1e-6),
        # transformers ties when either place says so.
        tied_head=section.only("tie_word_embeddings", False, True) or top.only("tie_word_embeddings", False, True),
        bos_id=None if section.get("bos_token_id", 1) is None else section.integer("bos_token_id", 1, least=0),
        eos_id=first,
        other_eos_ids=tuple(others),
        pad_id=0
        if pad is None or pad == -1
        else _Section({"pad_token_id": pad}, where).integer("pad_token_id", least=0),
    )


def _ids(section: _Section, key: str, default: Any = None) -> list[int]:
    """Returns an id or a list of them as a list without repetitions; of null, none."""
    value = section.get(key, default)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) > _MAX_IDS:
        raise UserError(f"{section.where}: '{key}' has {len(values)} ids, the limit is {_MAX_IDS}")
    return list(dict.fromkeys(_Section({key: one}, section.where).integer(key, least=0) for one in values))


def with_generation(arch: LlavaArchitecture, config: Any, *, where: str) -> LlavaArchitecture:
    """Returns `arch` with the ids of a generation_config.json that end an answer; what generates asks that file.

    Raises:
        UserError: they are no ids.
    """
    decoder = arch.decoder
    more = [one for one in _ids(_Section(config, where), "eos_token_id") if one not in decoder.eos_ids]
    decoder = dataclasses.replace(decoder, other_eos_ids=(*decoder.other_eos_ids, *more))
    return dataclasses.replace(arch, decoder=decoder)


def eos_to_hf(decoder: DecoderArchitecture) -> int | list[int]:
    """Returns the ids that end an answer as Hugging Face's files have them: one as a number, several as a list."""
    return list(decoder.eos_ids) if decoder.other_eos_ids else decoder.eos_id


def _rope(section: _Section) -> tuple[float, RopeScaling | None]:
    """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    legacy, current = section.get("rope_scaling"), section.get("rope_parameters")
    values, key = (legacy, "rope_scaling") if legacy else (current or {}, "rope_parameters")
    rope = _Section(values, f"{section.where}: {key}")
    theta = rope.number("rope_theta", section.get("rope_theta", 10_000.0))
    rope.only("partial_rotary_factor", 1.0, 1)
    kind_key = "rope_type" if "rope_type" in values or "type" not in values else "type"
    if rope.only(kind_key, "default", "llama3") == "default":
        return theta, None
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer(
            "original_max_position_embeddings", section.get("max_position_embeddings", None)
        ),
    )


def architecture_to_hf(arch: LlavaArchitecture, dtype: str = "bfloat16") -> dict[str, Any]:
    """Returns the config.json with which transformers 5 loads `arch` as LlavaForConditionalGeneration.

    Args:
        arch: the model; without image start and end vectors, for which the format has no place.
        dtype: type of the weights beside it.

    Raises:
        UserError: `arch` has image vectors.
    """
    if arch.image_vectors:
        raise UserError(
            "Hugging Face's LLaVA has no place for learned image start and end vectors (model.image_vectors); "
            "export this model in the released LLaVA-MoLE format instead"
        )
    vision, decoder = arch.vision, arch.decoder
    rope: dict[str, Any] = {"rope_theta": decoder.rope_theta, "rope_type": "default"}
    if decoder.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": decoder.rope_scaling.factor,
            "low_freq_factor": decoder.rope_scaling.low_freq_factor,
            "high_freq_factor": decoder.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": decoder.rope_scaling.original_max_position,
        }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": dtype,
        "image_seq_length": arch.features_per_image,
        "image_token_index": arch.image_token_id,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {
            "attention_bias": False,
            "bos_token_id": decoder.bos_id,
            "eos_token_id": eos_to_hf(decoder),
            "head_dim": decoder.head_dim,
            "hidden_act": "silu",
            "hidden_size": decoder.width,
            "intermediate_size": decoder.mlp_width,
            "max_position_embeddings": decoder.max_position,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": decoder.layers,
            "num_key_value_heads": decoder.kv_heads,
            "pad_token_id": decoder.pad_id,
            "rms_norm_eps": decoder.norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": decoder.tied_head,
            "vocab_size": decoder.vocab,
        },
        "tie_word_embeddings": decoder.tied_head,
        "vision_config": {
            "hidden_act": vision.activation,
            "hidden_size": vision.width,
            "image_size": vision.image_size,
            "intermediate_size": vision.mlp_width,
            "layer_norm_eps": vision.norm_eps,
            "model_type": "clip_vision_model",
            "num_attention_heads": vision.heads,
            "num_channels": 3,
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch_size,
        },
        "vision_feature_layer": arch.feature_layer,
        "vision_feature_select_strategy": "full" if arch.feature_select == "full" else "default",
    }
