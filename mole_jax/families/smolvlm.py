"""SmolVLM and Idefics3: a SigLIP whose last norm is applied, pixel shuffle, one matrix, a Llama; pictures are split."""

from __future__ import annotations

from typing import Any

from mole_jax.errors import UserError
from mole_jax.families.shared.decoders import decoder_from_hf, decoder_rows, decoder_to_hf
from mole_jax.families.shared.family import Family
from mole_jax.families.shared.names import Row, linear
from mole_jax.families.shared.processor import STANDARD, Processor, pixels_to_hf
from mole_jax.families.shared.section import Section
from mole_jax.families.shared.towers import CLIP, siglip_from_hf, vit_rows, vit_to_hf
from mole_jax.image_spec import Split
from mole_jax.model.architecture import ConnectorArchitecture, LlavaArchitecture, check_features

_TOWER_TYPES = ("smolvlm_vision", "idefics3_vision", "smolvlm", "idefics3", "siglip_vision_model")
_TOWER = CLIP | {"hidden_size": 1152, "num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh"}
_TOWER |= {"layer_norm_eps": 1e-6}
_RESAMPLE = 1
# Fields of older versions: what the processor says, and parts that were switched off.
_OLD_TEXT = {"is_llama_config": True, "qk_layer_norms": False, "rope_interleaved": False, "use_resampler": False}
_OLD_VISION = {"use_base_siglip": False}


def _without(values: Any, where: str, old: dict[str, Any], *ignored: str) -> Any:
    """Returns an object without fields of older versions; raises `UserError` where one says something else."""
    if not isinstance(values, dict):
        return values
    section = Section(values, where)
    for key, value in old.items():
        section.only(key, value, None, default=None)
    return {key: value for key, value in values.items() if key not in old and key not in ignored}


def _read(top: Section, processor: Processor) -> LlavaArchitecture:
    where = f"{top.where}: vision_config"
    values = _without(top.get("vision_config", {}), where, _OLD_VISION, "max_image_size", "size", "tie_word_embeddings")
    Section(values, where).only("model_type", *_TOWER_TYPES, None)
    vision = siglip_from_hf(values, where, defaults=_TOWER, post_norm="applied", fractional_positions=True)
    text = _without(
        top.get("text_config"), f"{top.where}: text_config", _OLD_TEXT, "perceiver_config", "pixel_shuffle_factor"
    )
    text = {"rms_norm_eps": 1e-5} if text is None else text
    processor.check_here()
    arch = LlavaArchitecture(
        vision=vision,
        decoder=decoder_from_hf(text, top),
        image_token_id=top.integer("image_token_id", 128257, least=0),
        feature_layer=-1,
        connector=ConnectorArchitecture(layers=1, bias=False, shuffle=top.integer("scale_factor", 2)),
        tiling=_tiling(processor, vision.image_size),
        fit="stretch",
        family="smolvlm",
        **processor.preparation(STANDARD, STANDARD, _RESAMPLE)._asdict(),
    )
    check_features(arch, where=top.where)
    processor.check_all_read("do_pad")  # it pads batches, whose tiles are all of one size here
    top.check_all_read("_pad_token_id", "vocab_size", "image_seq_len")
    return arch


def _tiling(processor: Processor, side: int) -> Split:
    image = processor.image
    processor.check_side("max_image_size", side, "longest_edge")
    if "max_image_size" not in image and side != 364:
        raise UserError(f"{image.where}: 'max_image_size' is missing; it says into which tiles pictures are split")
    size = image.get("size", {"longest_edge": 4 * 364})
    longest = size.get("longest_edge") if isinstance(size, dict) else None
    if type(longest) is not int or not side <= longest <= 1_000 * side:
        raise UserError(f"{image.where}: 'size' is {size!r}, expected 'longest_edge' of at least {side} pixels")
    return Split(longest, split=image.only("do_image_splitting", True, False))


def _config(arch: LlavaArchitecture) -> dict[str, Any]:
    vision = {key: value for key, value in vit_to_hf(arch.vision).items() if key != "vision_use_head"}
    return {
        "image_token_id": arch.image_token_id,
        "pad_token_id": arch.decoder.pad_id,
        "scale_factor": arch.connector.shuffle,
        "text_config": decoder_to_hf(arch.decoder),
        "tie_word_embeddings": arch.decoder.tied_head,
        "vision_config": vision | {"model_type": "smolvlm_vision"},
    }


def _processor(arch: LlavaArchitecture, image: str) -> tuple[dict[str, Any], dict[str, Any]]:
    assert isinstance(arch.tiling, Split)
    pixels = pixels_to_hf(arch.mean, arch.std, arch.resample) | {
        "do_image_splitting": arch.tiling.split,
        "do_pad": True,
        "image_processor_type": "SmolVLMImageProcessor",
        "max_image_size": {"longest_edge": arch.vision.image_size},
        "processor_class": "SmolVLMProcessor",
        "size": {"longest_edge": arch.tiling.longest},
    }
    return dict(sorted(pixels.items())), {
        "image_seq_len": arch.features_per_image,
        "processor_class": "SmolVLMProcessor",
    }


def _rows(arch: LlavaArchitecture) -> tuple[Row, ...]:
    return (
        *vit_rows(arch.vision, "model.vision_model."),
        *linear("projector/linear_1", "I D", "model.connector.modality_projection.proj", bias=False),
        *decoder_rows(arch.decoder, "model.text_model.", "lm_head.weight"),
    )


FAMILY = Family(
    name="smolvlm",
    types=("smolvlm", "idefics3"),
    classes="SmolVLMForConditionalGeneration",
    mark="<image>",
    read=_read,
    config=_config,
    processor=_processor,
    rows=_rows,
    canonical=lambda name: name,
    module=lambda name: name,
    decoder="text_model",
    tower="vision_model",
    connector="connector",
)
