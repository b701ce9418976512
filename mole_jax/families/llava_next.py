"""LLaVA-NeXT (1.6): a base view and tiles of the best of some resolutions, rows of features ended by a newline."""

from __future__ import annotations

from typing import Any

from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.families.shared.connectors import canonical
from mole_jax.families.shared.family import Family
from mole_jax.families.shared.llava_like import (
    UNUSED_FIELDS,
    check_processor,
    llava_like_rows,
    llava_like_to_hf,
    pooling_head,
    read_llava_like,
    resolutions,
    same_resolutions,
    strategy_to_hf,
)
from mole_jax.families.shared.processor import Processor, pixels_to_hf
from mole_jax.families.shared.section import Section
from mole_jax.image_spec import AnyRes
from mole_jax.model.architecture import LlavaArchitecture

_RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def _read(top: Section, processor: Processor) -> LlavaArchitecture:
    top.only("use_image_newline_parameter", True)
    common = read_llava_like(top, layer=-2, strategy="default", image_token=32000)
    side = common["vision"].image_size
    processor.check_here()
    arch = LlavaArchitecture(
        **common,
        **processor.preparation(CLIP_MEAN, CLIP_STD)._asdict(),
        image_newline=True,
        tiling=AnyRes(resolutions(top, _RESOLUTIONS, side)),
        fit="stretch",
        family="llava_next",
    )
    same_resolutions(arch, processor)
    processor.image.only("do_pad", True)
    processor.image.only("do_center_crop", True)  # of tiles that have the crop's size already
    processor.check_side("size", side, "shortest_edge", "height", "width")
    processor.check_side("crop_size", side, "height", "width")
    check_processor(arch, processor)
    processor.check_all_read("aspect_ratio_setting")
    top.check_all_read(*UNUSED_FIELDS)
    return arch


def _config(arch: LlavaArchitecture) -> dict[str, Any]:
    assert isinstance(arch.tiling, AnyRes)
    pairs = [list(pair) for pair in arch.tiling.resolutions]
    return llava_like_to_hf(arch) | {"image_grid_pinpoints": pairs, "image_seq_length": arch.features_per_image}


def _processor(arch: LlavaArchitecture, image: str) -> tuple[dict[str, Any], dict[str, Any]]:
    assert isinstance(arch.tiling, AnyRes)
    side = arch.vision.image_size
    pixels = pixels_to_hf(arch.mean, arch.std, arch.resample) | {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_pad": True,
        "image_grid_pinpoints": [list(pair) for pair in arch.tiling.resolutions],
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "size": {"shortest_edge": side},
    }
    own = {
        "image_token": image,
        "num_additional_image_tokens": int(arch.vision.class_token),
        "patch_size": arch.vision.patch_size,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": strategy_to_hf(arch),
    }
    return dict(sorted(pixels.items())), own


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
