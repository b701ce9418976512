"""LLaVA-OneVision: as LLaVA-NeXT, with a SigLIP, a Qwen2, and large grids of features shrunk (``anyres_max_N``)."""

from __future__ import annotations

import re
from typing import Any

from mole_jax.errors import UserError
from mole_jax.families.shared.anyres import anyres_pixels, read_anyres, tiles_to_hf
from mole_jax.families.shared.connectors import canonical
from mole_jax.families.shared.family import Family
from mole_jax.families.shared.llava_like import (
    llava_like_rows,
    llava_like_to_hf,
    pooling_head,
    read_llava_like,
    strategy_to_hf,
)
from mole_jax.families.shared.processor import Processor
from mole_jax.families.shared.section import Section
from mole_jax.image_spec import AnyRes
from mole_jax.model.architecture import LlavaArchitecture

_SIDES = range(384, 2305, 384)
_RESOLUTIONS = tuple((height, width) for height in _SIDES for width in _SIDES)
_MOST_TILES = 1_000


def _most(section: Section) -> int:
    """Returns N of ``vision_aspect_ratio``; raises `UserError` for another setting than ``anyres_max_N``."""
    value = section.get("vision_aspect_ratio", "anyres_max_9")
    found = re.fullmatch(r"anyres_max_(\d{1,4})", value) if isinstance(value, str) else None
    if found is None or not 1 <= int(found[1]) <= _MOST_TILES:
        raise UserError(f"{section.where}: 'vision_aspect_ratio' is {value!r}, only 'anyres_max_N' is supported")
    return int(found[1])


def _read(top: Section, processor: Processor) -> LlavaArchitecture:
    common = read_llava_like(
        top, layer=-1, strategy="full", image_token=151646, tower="siglip_vision_model", decoder="qwen2"
    )
    arch = read_anyres(top, processor, common, _RESOLUTIONS, family="llava_onevision", most=_most(top), alone=True)
    processor.check_same(processor.top, "vision_aspect_ratio", _aspect(arch))
    processor.image.only("do_center_crop", None, False)
    processor.check_side("size", arch.vision.image_size, "height", "width")
    processor.check_all_read()
    return arch


def _aspect(arch: LlavaArchitecture) -> str:
    assert isinstance(arch.tiling, AnyRes)
    return f"anyres_max_{arch.tiling.most}"


def _config(arch: LlavaArchitecture) -> dict[str, Any]:
    return llava_like_to_hf(arch) | tiles_to_hf(arch) | {"vision_aspect_ratio": _aspect(arch)}


def _processor(arch: LlavaArchitecture, image: str) -> tuple[dict[str, Any], dict[str, Any]]:
    side = arch.vision.image_size
    pixels = anyres_pixels(arch) | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "size": {"height": side, "width": side},
    }
    own = {
        "image_token": image,
        "num_image_tokens": arch.features_per_image,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": _aspect(arch),
        "vision_feature_select_strategy": strategy_to_hf(arch),
    }
    return dict(sorted(pixels.items())), own


FAMILY = Family(
    name="llava_onevision",
    types=("llava_onevision",),
    classes="LlavaOnevisionForConditionalGeneration",
    mark="<image>",
    read=_read,
    config=_config,
    processor=_processor,
    rows=lambda arch: llava_like_rows(arch, "vision_tower."),
    canonical=canonical,
    unused=pooling_head,
)
