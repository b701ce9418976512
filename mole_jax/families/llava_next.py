"""LLaVA-NeXT (1.6): a base view and tiles of the best of some resolutions, rows of features ended by a newline."""

from __future__ import annotations

from typing import Any

from mole_jax.families.shared.anyres import anyres_pixels, read_anyres, tiles_to_hf
from mole_jax.families.shared.connectors import canonical
from mole_jax.families.shared.family import Family
from mole_jax.families.shared.llava_like import (
    llava_like_rows,
    llava_like_to_hf,
    pooling_head,
    processor_to_hf,
    read_llava_like,
)
from mole_jax.families.shared.processor import Processor
from mole_jax.families.shared.section import Section
from mole_jax.model.architecture import LlavaArchitecture

_RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def _read(top: Section, processor: Processor) -> LlavaArchitecture:
    common = read_llava_like(top, layer=-2, strategy="default", image_token=32000)
    arch = read_anyres(top, processor, common, _RESOLUTIONS, family="llava_next")
    processor.image.only("do_center_crop", True)  # of tiles that have the crop's size already
    processor.check_side("size", arch.vision.image_size, "shortest_edge", "height", "width")
    processor.check_all_read("aspect_ratio_setting")
    return arch


def _config(arch: LlavaArchitecture) -> dict[str, Any]:
    return llava_like_to_hf(arch) | tiles_to_hf(arch) | {"image_seq_length": arch.features_per_image}


def _processor(arch: LlavaArchitecture, image: str) -> tuple[dict[str, Any], dict[str, Any]]:
    side, kind = arch.vision.image_size, "LlavaNextProcessor"
    pixels = anyres_pixels(arch) | {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": kind,
        "size": {"shortest_edge": side},
    }
    return dict(sorted(pixels.items())), processor_to_hf(arch, image, kind)


FAMILY = Family(
    name="llava_next",
    types=("llava_next",),
    classes="LlavaNextForConditionalGeneration",
    mark="<image>",
    read=_read,
    config=_config,
    processor=_processor,
    rows=lambda arch: llava_like_rows(arch, "vision_tower."),
    canonical=canonical,
    unused=pooling_head,
)
