"""From Pillow's modes to RGB of 8 bits; and what a user should know of an image that is more than that."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, TiffImagePlugin

from mole_jax.errors import UserError
from mole_jax.image_spec import Transparency

WIDE, TRANSPARENT, TURNED = "wide", "transparent", "turned"
REMARKS = {
    WIDE: "have grey values of 16 bits or floats; scaled to 8 bits by the range of their type",
    TRANSPARENT: "have transparent places; the model sees the colour stored there, as in LLaVA (data.transparency "
    "stored): set data.transparency white to put them on white",
    TURNED: "have an EXIF orientation and are read as stored, as in LLaVA (data.exif ignore); viewers, and "
    "transformers' load_image where an export is served, turn them: set data.exif apply to train on what they show",
}
"""What is remarked about the images of a domain, "N images …"."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation."""
ON_ITS_SIDE = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))
"""The turns that exchange width and height."""
_LEAST_USED = 16
"""An image that uses less than this part of its type's range was not made for it: 12-bit values in 16 bits."""
_ONE_WHITE, _BITS_PER_SAMPLE, _PHOTOMETRIC = 1.0, 258, 262


def to_rgb(image: Image.Image, transparency: Transparency = "stored") -> Image.Image:
    """Returns an opened image in mode RGB, not turned.

    Grey values of more than 8 bits are scaled by the range of their type. Pillow's `convert` would cut them: a
    radiograph of 16 bits would be white, one of floats black. All other modes are `convert("RGB")`, as in LLaVA: it
    drops transparency and shows the colour that is stored beneath. With `transparency` white they are laid on white
    first, as transformers' processors of SmolVLM and Idefics3 do.

    Raises:
      UserError: grey values of which it is not known what is white. The message lacks the image's name.
    """
    if not _is_wide(image):
        if transparency == "white" and image.has_transparency_data:
            above = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
        return image.convert("RGB")
    return Image.fromarray(_eight_bits(image)).convert("RGB")


def remarks(image: Image.Image) -> list[str]:
    """Returns the keys of `REMARKS` that hold for an opened image; decodes one that may be transparent."""
    found = []
    if _is_wide(image):
        found.append(WIDE)
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        found.append(TRANSPARENT)
    if turn_of(image) is not None:
        found.append(TURNED)
    return found


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Returns how an opened image must be turned to stand as its EXIF orientation says; None: it does.

    A broken EXIF block says nothing. Pillow turns a TIFF by itself.
    """
    if image.format == "TIFF":
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # whatever a broken block makes Pillow trip over
        return None


def _is_wide(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _eight_bits(image: Image.Image) -> UInt8[np.ndarray, "H W"]:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not 0 <= low <= high <= _ONE_WHITE:
            raise UserError(
                f"has float values from {low:g} to {high:g}, and only 0 (black) to 1 (white) have a known meaning; "
                "save it with 8 bits"
            )
        scaled = np.rint(values * 255).astype(np.uint8)
    else:
        white = _white(image)
        if 0 < high <= white // _LEAST_USED:
            raise UserError(
                f"has values up to {high:,} where {white:,} is white (12-bit values in 16 bits?), so it would be "
                "almost black; save it with 8 bits, or scale it to all of its range"
            )
        scaled = ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    # Pillow swaps black and white for a TIFF of 8 bits that wants it, but not for these.
    swapped = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0
    return 255 - scaled if swapped else scaled


def _white(image: Image.Image) -> int:
    """Returns the value that is white in the type of an image of whole numbers."""
    if image.mode != "I":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,)) if isinstance(image, TiffImagePlugin.TiffImageFile) else (16,)
        return 2 ** bits[0] - 1
    if image.format == "PPM":
        return 2**16 - 1  # Pillow scales whatever a PGM says is white to this
    raise UserError("has signed or 32-bit values, of which no one knows what is white; save it with 8 bits")
