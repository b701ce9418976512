"""LLaVA-1.5 and its kin: a CLIP or SigLIP, an MLP, and a Llama, Mistral, Qwen2 or Qwen3; a picture is one tile.

Four key layouts of such files exist (all read, the first written):

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

from typing import Any

from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.errors import UserError
from mole_jax.families.shared import connectors
from mole_jax.families.shared.family import Family
from mole_jax.families.shared.llava_like import (
    UNUSED_FIELDS,
    check_processor,
    llava_like_rows,
    llava_like_to_hf,
    pooling_head,
    processor_to_hf,
    read_llava_like,
)
from mole_jax.families.shared.names import Row
from mole_jax.families.shared.processor import STANDARD, Processor, pixels_to_hf
from mole_jax.families.shared.section import Section
from mole_jax.image_spec import Fit
from mole_jax.model.architecture import LlavaArchitecture, VisionArchitecture

TOWER = "vision_tower.vision_model."


def canonical(name: str) -> str:
    """Returns a tensor's name of any of the four layouts as the hub's legacy layout has it."""
    name = connectors.canonical(name)
    return TOWER + name.removeprefix("vision_tower.") if name.startswith("vision_tower.") else name


def _read(top: Section, processor: Processor) -> LlavaArchitecture:
    common = read_llava_like(top, layer=-2, strategy="default", image_token=32000)
    vision: VisionArchitecture = common["vision"]
    if not vision.class_token:
        processor.check_here()
    mean, std = (CLIP_MEAN, CLIP_STD) if vision.class_token else (STANDARD, STANDARD)
    prepared = processor.preparation(mean, std)
    arch = LlavaArchitecture(**common, **prepared._asdict(), fit=_fit(processor, vision))
    check_processor(arch, processor)
    processor.check_all_read()
    top.check_all_read(*UNUSED_FIELDS)
    return arch


def _fit(processor: Processor, vision: VisionArchitecture) -> Fit:
    image, side = processor.image, vision.image_size
    if not processor.here:
        return "pad"
    size = image.get("size")
    processor.check_side("size", side, "height", "width", "shortest_edge")
    processor.check_side("crop_size", side, "height", "width")
    crops, pads = (image.only(key, True, False, None, default=None) for key in ("do_center_crop", "do_pad"))
    if isinstance(size, dict) and "height" in size and not crops:
        return "stretch"
    if pads:
        return "pad"
    if crops is False:
        raise UserError(
            f"{image.where}: 'do_center_crop' is False, so pictures would not become square; only true is supported"
        )
    # The hub's files of LLaVA-1.5 crop, though it was trained on pictures padded to squares; `data.image_aspect` tells.
    return "pad" if vision.class_token else "crop"


def _config(arch: LlavaArchitecture) -> dict[str, Any]:
    return llava_like_to_hf(arch) | {"image_seq_length": arch.features_per_image}


def _processor(arch: LlavaArchitecture, image: str) -> tuple[dict[str, Any], dict[str, Any]]:
    side = arch.vision.image_size
    pixels = pixels_to_hf(arch.mean, arch.std, arch.resample) | {"processor_class": "LlavaProcessor"}
    square = {"height": side, "width": side}
    if arch.fit == "stretch":
        pixels |= {"image_processor_type": "SiglipImageProcessor", "size": square}
    else:
        pixels |= {
            "crop_size": square,
            "do_center_crop": True,
            "do_pad": arch.fit == "pad",  # to a square, with the mean colour
            "image_processor_type": "LlavaImageProcessor",
            "size": {"shortest_edge": side},
        }
    return dict(sorted(pixels.items())), processor_to_hf(arch, image, "LlavaProcessor")


def _rows(arch: LlavaArchitecture) -> tuple[Row, ...]:
    return llava_like_rows(arch, TOWER)


FAMILY = Family(
    name="llava",
    types=("llava",),
    classes="LlavaForConditionalGeneration",
    mark="<image>",
    read=_read,
    config=_config,
    processor=_processor,
    rows=_rows,
    canonical=canonical,
    unused=pooling_head,
)
