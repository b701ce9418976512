"""What LLaVA, LLaVA-NeXT and LLaVA-OneVision have in common: towers, an MLP, and the names of their parts."""

from __future__ import annotations

from typing import Any

from mole_jax.errors import UserError
from mole_jax.families.shared.connectors import CONNECTOR, DECODER, HEAD, mlp_rows
from mole_jax.families.shared.decoders import decoder_from_hf, decoder_rows, decoder_to_hf
from mole_jax.families.shared.names import Row
from mole_jax.families.shared.processor import Processor
from mole_jax.families.shared.section import Section
from mole_jax.families.shared.towers import clip_from_hf, siglip_from_hf, vit_rows, vit_to_hf
from mole_jax.model.architecture import CLIP_L_336, LlavaArchitecture, VisionArchitecture

SIGLIP_TYPES = ("siglip_vision_model",)
UNUSED_FIELDS = ("image_seq_length", "video_token_index", "video_token_id", "vocab_size")
"""Fields that LLaVA-like configs have and that their model does not use: what the processor counts, tokens of videos
(which are not read), and the size of the vocabulary, which is the decoder's to say."""


def tower_from_hf(top: Section, kind: str = "clip_vision_model") -> VisionArchitecture:
    """Reads the ``vision_config``; `kind` is the ``model_type`` of one that does not say it.

    Raises:
        UserError: it is neither a CLIP nor a SigLIP, or as these say.
    """
    values, where = top.get("vision_config"), f"{top.where}: vision_config"
    if values is None and kind == "clip_vision_model":
        return CLIP_L_336
    if values is None:
        raise UserError(f"{where}: is missing; it describes the vision tower")
    found = Section(values, where).only("model_type", "clip_vision_model", *SIGLIP_TYPES, default=kind)
    return siglip_from_hf(values, where) if found in SIGLIP_TYPES else clip_from_hf(values, where)


def read_llava_like(
    top: Section,
    *,
    layer: int,
    strategy: str,
    image_token: int,
    tower: str = "clip_vision_model",
    decoder: str = "llama",
) -> dict[str, Any]:
    """Reads what the three have in common, as arguments of `LlavaArchitecture`.

    Args:
        top: the config.
        layer: the feature layer of one that does not say it.
        strategy: how features are selected there.
        image_token: id of the image token there.
        tower: kind of the tower there.
        decoder: kind of the decoder there.

    Raises:
        UserError: a value is malformed, or of a part that is not supported or not known.
    """
    top.only("projector_hidden_act", "gelu")
    top.only("multimodal_projector_bias", True)
    select = top.only("vision_feature_select_strategy", "default", "full", default=strategy)
    vision = tower_from_hf(top, tower)
    if select == "default" and not vision.class_token:
        raise UserError(
            f"{top.where}: 'vision_feature_select_strategy' 'default' would drop the first patch of a tower that has "
            "no class token; only 'full' is supported there"
        )
    key = "image_token_index" if "image_token_index" in top else "image_token_id"
    return {
        "vision": vision,
        "decoder": decoder_from_hf(top.get("text_config"), top, decoder),
        "image_token_id": top.integer(key, image_token, least=0),
        "feature_layer": feature_layer(top, layer, vision),
        "feature_select": "full" if select == "full" else "patch",
    }


def feature_layer(top: Section, default: int, vision: VisionArchitecture) -> int:
    """Returns ``vision_feature_layer``; raises `UserError` if it is no single layer of the tower."""
    layer = top.get("vision_feature_layer", default)
    if isinstance(layer, bool) or not isinstance(layer, int) or not -vision.layers - 1 <= layer <= vision.layers:
        raise UserError(
            f"{top.where}: 'vision_feature_layer' is {layer!r}, expected one of the {vision.layers + 1} hidden states"
        )
    return layer


def llava_like_to_hf(arch: LlavaArchitecture) -> dict[str, Any]:
    """Returns the config of what the three have in common."""
    return {
        "image_token_index": arch.image_token_id,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": decoder_to_hf(arch.decoder),
        "tie_word_embeddings": arch.decoder.tied_head,
        "vision_config": vit_to_hf(arch.vision),
        "vision_feature_layer": arch.feature_layer,
        "vision_feature_select_strategy": strategy_to_hf(arch),
    }


def strategy_to_hf(arch: LlavaArchitecture) -> str:
    """Returns how Hugging Face's files call the selection of features: without a class token all are taken."""
    return "full" if arch.feature_select == "full" or not arch.vision.class_token else "default"


def llava_like_rows(arch: LlavaArchitecture, tower: str) -> tuple[Row, ...]:
    """Returns the table of the three; names of the tower begin with `tower`."""
    newline = (Row("image_newline", "D", "image_newline"),)
    return (
        *vit_rows(arch.vision, tower),
        *mlp_rows(arch.connector, CONNECTOR),
        *(newline if arch.image_newline else ()),
        *decoder_rows(arch.decoder, DECODER, HEAD),
    )


def pooling_head(name: str) -> bool:
    """Tells whether a tensor is of the head with which SigLIP pools patches; no feature comes from there."""
    return name.startswith(("vision_tower.head.", "vision_tower.vision_model.head."))


def processor_to_hf(arch: LlavaArchitecture, image: str, kind: str) -> dict[str, Any]:
    """Returns the processor_config.json of LLaVA and LLaVA-NeXT; `kind` is its class in transformers."""
    return {
        "image_token": image,
        # The class token, which the strategy "default" takes off again.
        "num_additional_image_tokens": int(arch.vision.class_token),
        "patch_size": arch.vision.patch_size,
        "processor_class": kind,
        "vision_feature_select_strategy": strategy_to_hf(arch),
    }


def check_processor(arch: LlavaArchitecture, processor: Processor) -> None:
    """Raises `UserError` if processor_config.json contradicts config.json."""
    processor.check_same(processor.top, "patch_size", arch.vision.patch_size)
    processor.check_same(processor.top, "vision_feature_select_strategy", strategy_to_hf(arch))
