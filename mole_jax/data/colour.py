"""From Pillow's modes to RGB of 8 bits; and what a user should know of an image that is more than that."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, TiffImagePlugin

from mole_jax.errors import UserError

WIDE, TRANSPARENT, TURNED = "wide", "transparent", "turned"
REMARKS = {
    WIDE: "have grey values of 16 bits or floats; scaled to 8 bits by the range of their type",
    TRANSPARENT: "have transparent places; the model sees the colour stored there, as in LLaVA: for another one, put "
    "them on a background",
    TURNED: "have an EXIF orientation and are read as stored, as in LLaVA; viewers, and transformers' load_image where "
    "an export is served, turn them: turn the files themselves to train on what is shown there",
}
"""What is remarked about the images of a domain, "N images …"."""
_LEAST_USED = 16
"""An image that uses less than this part of its type's range was not made for it: 12-bit values in 16 bits."""
_ONE_WHITE, _BITS_PER_SAMPLE, _PHOTOMETRIC = 1.0, 258, 262


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an opened image in mode RGB.

    Grey values of more than 8 bits are scaled by the range of their type. Pillow's `convert` would cut them: a
    radiograph of 16 bits would be white, one of floats black. All other modes are `convert("RGB")`, as in LLaVA: it
    drops transparency and shows the colour that is stored beneath.

    Raises:
      UserError: grey values of which it is not known what is white. The message lacks the image's name.
    """
    if not _is_wide(image):
        return image.convert("RGB")
    return Image.fromarray(_eight_bits(image)).convert("RGB")


def remarks(image: Image.Image) -> list[str]:
    """Returns the keys of `REMARKS` that hold for an opened image; decodes one that may be transparent."""
    found = []
    if _is_wide(image):
        found.append(WIDE)
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        found.append(TRANSPARENT)
    # Pillow turns a TIFF by itself.
    if image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        found.append(TURNED)
    return found


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
