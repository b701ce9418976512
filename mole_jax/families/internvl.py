"""InternVL 2.5 and 3, in the form of transformers: an InternViT, pixel shuffle, a norm and an MLP, a Qwen or Llama."""

from __future__ import annotations

from typing import Any

from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.errors import UserError
from mole_jax.families.shared.connectors import CONNECTOR, DECODER, HEAD, TOWER, canonical, mlp_rows
from mole_jax.families.shared.decoders import decoder_from_hf, decoder_rows, decoder_to_hf
from mole_jax.families.shared.family import Family
from mole_jax.families.shared.llava_like import feature_layer
from mole_jax.families.shared.names import Row
from mole_jax.families.shared.processor import Processor, pixels_to_hf
from mole_jax.families.shared.section import Section
from mole_jax.families.shared.towers import internvit_from_hf, internvit_rows, internvit_to_hf
from mole_jax.image_spec import Grid
from mole_jax.model.architecture import ConnectorArchitecture, LlavaArchitecture, check_features

_MOST_TILES = 1_000


def _read(top: Section, processor: Processor) -> LlavaArchitecture:
    top.only("projector_hidden_act", "gelu")
    top.only("vision_feature_select_strategy", "default")  # pixel shuffle has no place for the class token
    last = top.get("vision_feature_layer", -1) == -1
    vision = internvit_from_hf(top.get("vision_config", {}), f"{top.where}: vision_config", last_layer=last)
    processor.check_here()
    arch = LlavaArchitecture(
        vision=vision,
        decoder=decoder_from_hf(top.get("text_config"), _tied_by_default(top), "qwen2"),
        image_token_id=top.integer("image_token_id", 151667, least=0),
        feature_layer=feature_layer(top, -1, vision),
        connector=ConnectorArchitecture(shuffle=_shuffle(top), norm=True),
        tiling=_tiling(processor),
        fit="stretch",
        family="internvl",
        **processor.preparation(CLIP_MEAN, CLIP_STD)._asdict(),
    )
    check_features(arch, where=top.where)
    processor.check_side("size", vision.image_size, "height", "width")
    processor.check_all_read()
    top.check_all_read("image_seq_length", "vocab_size")
    return arch


def _tied_by_default(top: Section) -> Section:
    """Returns the config with its head tied where it does not say, as transformers has it."""
    top.defaults = {**top.defaults, "tie_word_embeddings": True}
    return top


def _shuffle(top: Section) -> int:
    ratio = top.number("downsample_ratio", 0.5)
    factor = round(1 / ratio)
    if factor < 1 or abs(factor * ratio - 1) > 1e-6:
        raise UserError(f"{top.where}: 'downsample_ratio' is {ratio!r}, expected one over a whole number")
    return factor


def _tiling(processor: Processor) -> Grid:
    image = processor.image
    # Whatever this says, the processor asks for tiles.
    image.get("crop_to_patches")
    least, most = image.integer("min_patches", 1), image.integer("max_patches", 12)
    if not least <= most <= _MOST_TILES:
        raise UserError(f"{image.where}: pictures of {least} ('min_patches') to {most} ('max_patches') tiles are none")
    return Grid(least, most)


def _config(arch: LlavaArchitecture) -> dict[str, Any]:
    return {
        "downsample_ratio": 1 / arch.connector.shuffle,
        "image_seq_length": arch.features_per_image,
        "image_token_id": arch.image_token_id,
        "projector_hidden_act": "gelu",
        "text_config": decoder_to_hf(arch.decoder),
        "tie_word_embeddings": arch.decoder.tied_head,
        "vision_config": internvit_to_hf(arch.vision),
        "vision_feature_layer": arch.feature_layer,
        "vision_feature_select_strategy": "default",
    }


def _processor(arch: LlavaArchitecture, image: str) -> tuple[dict[str, Any], dict[str, Any]]:
    assert isinstance(arch.tiling, Grid)
    side = arch.vision.image_size
    pixels = pixels_to_hf(arch.mean, arch.std, arch.resample) | {
        "crop_to_patches": True,
        "image_processor_type": "GotOcr2ImageProcessor",
        "max_patches": arch.tiling.most,
        "min_patches": arch.tiling.least,
        "processor_class": "InternVLProcessor",
        "size": {"height": side, "width": side},
    }
    return dict(sorted(pixels.items())), {
        "image_seq_length": arch.features_per_image,
        "processor_class": "InternVLProcessor",
    }


def _rows(arch: LlavaArchitecture) -> tuple[Row, ...]:
    return (
        *internvit_rows(arch.vision, TOWER),
        *mlp_rows(arch.connector, CONNECTOR),
        *decoder_rows(arch.decoder, DECODER, HEAD),
    )


FAMILY = Family(
    name="internvl",
    types=("internvl",),
    classes="InternVLForConditionalGeneration",
    mark="<IMG_CONTEXT>",
    read=_read,
    config=_config,
    processor=_processor,
    rows=_rows,
    canonical=canonical,
)
