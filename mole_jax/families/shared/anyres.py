"""What LLaVA-NeXT and LLaVA-OneVision have in common: a base view, and tiles of the best of some resolutions."""

from __future__ import annotations

from typing import Any

from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.errors import UserError
from mole_jax.families.shared.llava_like import UNUSED_FIELDS, check_processor
from mole_jax.families.shared.processor import Processor, pixels_to_hf
from mole_jax.families.shared.section import Section
from mole_jax.image_spec import AnyRes
from mole_jax.model.architecture import LlavaArchitecture

Resolutions = tuple[tuple[int, int], ...]
"""Height and width of each, in pixels."""
_MOST_RESOLUTIONS = 1_000


def read_anyres(
    top: Section, processor: Processor, common: dict[str, Any], default: Resolutions, *, family: str, **tiling: Any
) -> LlavaArchitecture:
    """Makes the architecture of a config that is read but for its tiles, and checks the processor's files against it.

    Args:
        top: the config.
        processor: the processor's files.
        common: what `read_llava_like` has read.
        default: the resolutions of a config that does not say them.
        family: the family's name.
        tiling: further fields of `AnyRes`.

    Raises:
        UserError: there is no processor's file, one contradicts the config, or a field of it is not known.
    """
    side = common["vision"].image_size
    top.only("use_image_newline_parameter", True)
    processor.check_here()
    cut = AnyRes(_resolutions(top, default, side), **tiling)
    arch = LlavaArchitecture(
        **common,
        **processor.preparation(CLIP_MEAN, CLIP_STD)._asdict(),
        image_newline=True,
        tiling=cut,
        fit="stretch",
        family=family,
    )
    if _resolutions(processor.image, cut.resolutions, side) != cut.resolutions:
        raise UserError(
            f"{processor.image.where}: 'image_grid_pinpoints' are others than in config.json; the two contradict"
        )
    processor.image.only("do_pad", True)
    processor.check_side("crop_size", side, "height", "width")
    check_processor(arch, processor)
    top.check_all_read(*UNUSED_FIELDS)
    return arch


def tiles_to_hf(arch: LlavaArchitecture) -> dict[str, Any]:
    """Returns what the configs of model and processor both say of the tiles."""
    assert isinstance(arch.tiling, AnyRes)
    return {"image_grid_pinpoints": [list(pair) for pair in arch.tiling.resolutions]}


def anyres_pixels(arch: LlavaArchitecture) -> dict[str, Any]:
    """Returns the fields of preprocessor_config.json that both have."""
    return pixels_to_hf(arch.mean, arch.std, arch.resample) | tiles_to_hf(arch) | {"do_pad": True}


def _resolutions(section: Section, default: Resolutions, side: int) -> Resolutions:
    """Returns ``image_grid_pinpoints``.

    Raises:
        UserError: they are no such list, or not multiples of the tile's `side`.
    """
    value = section.get("image_grid_pinpoints")
    if value is None:
        return default
    pairs: list[Any] = value if isinstance(value, list) and 0 < len(value) <= _MOST_RESOLUTIONS else [value]
    return tuple(_resolution(section, pair, side) for pair in pairs)


def _resolution(section: Section, pair: Any, side: int) -> tuple[int, int]:
    whole = isinstance(pair, list) and len(pair) == 2 and all(type(one) is int for one in pair)
    if not whole or any(one < side or one % side or one > side * _MOST_RESOLUTIONS for one in pair):
        raise UserError(
            f"{section.where}: 'image_grid_pinpoints' has {pair!r}, expected [height, width] in multiples of the "
            f"tower's {side} pixels"
        )
    return pair[0], pair[1]
