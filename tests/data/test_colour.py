"""Images of more than 8 bits, with transparency or with an orientation: the right pixels, and what is said of them."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data.colour import REMARKS, TRANSPARENT, TURNED, WIDE
from mole_jax.data.desk import check
from mole_jax.data.desk.opened import open_loader
from mole_jax.data.image import image_remarks, load_image, load_tiles, square_spec
from mole_jax.errors import UserError
from tests.data.domains_on_disk import IMAGE, record, write

LIMITS = {"size": 16, "aspect": "pad", "max_pixels": 10_000}
SPEC = square_spec(16, "pad")
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
PHOTOMETRIC, ORIENTATION = 262, 274


def _encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _grey(content: bytes) -> np.ndarray:
    pixels = load_image(content, None, **LIMITS)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def _tiff(values: np.ndarray, bits: int, *, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """A TIFF of one uncompressed strip: Pillow writes neither big-endian values nor white as zero."""
    height, width = values.shape
    body = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(body)), (339, sample_format)]
    endian = "little" if order == "<" else "big"

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, endian)

    entries = b"".join(number(tag, 2) + number(4, 2) + number(1, 4) + number(value, 4) for tag, value in tags)
    head = (b"II" if order == "<" else b"MM") + number(42, 2) + number(8 + len(body), 4)
    return head + body + number(len(tags), 2) + entries + number(0, 4)


WIDE_GREY = GREY.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "content",
    [
        _encoded(Image.fromarray(WIDE_GREY)),
        _encoded(Image.fromarray(WIDE_GREY), "TIFF"),
        _tiff(WIDE_GREY, 16, order=">"),
        _tiff(65535 - WIDE_GREY, 16, photometric=0),
        _encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
        _tiff(1 - GREY.astype(np.float32) / 255, 32, sample_format=3, photometric=0),
        b"P5 16 16 65535\n" + WIDE_GREY.astype(">u2").tobytes(),
        b"P5 16 16 4095\n" + np.rint(GREY / 255 * 4095).astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "big-endian", "white-is-zero", "float", "float-white-is-zero", "pgm", "pgm of 12 bits"],
)
def test_wide_grey_values_are_those_of_8_bits(content):
    assert Image.open(io.BytesIO(content)).mode not in ("L", "RGB")
    np.testing.assert_array_equal(_grey(content), GREY)
    assert image_remarks(content, None, SPEC) == [WIDE]


def test_twelve_bits_that_a_tiff_declares_are_scaled_by_their_range():
    twelve = np.rint(GREY / 255 * 4095).astype(np.uint16).reshape(-1, 2)
    first, second = twelve[:, 0], twelve[:, 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8)
    content = _tiff(packed.reshape(16, 24), 12).replace((24).to_bytes(4, "little"), (16).to_bytes(4, "little"), 1)
    assert Image.open(io.BytesIO(content)).size == (16, 16)
    np.testing.assert_array_equal(_grey(content), GREY)


def test_a_black_image_is_black():
    assert _grey(_encoded(Image.fromarray(np.zeros((16, 16), np.uint16)))).max() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_encoded(Image.fromarray(WIDE_GREY // 16)), r"has values up to 4,095 where 65,535 is white \(12-bit values"),
        (_encoded(Image.fromarray(WIDE_GREY.astype(np.int32)), "TIFF"), "has signed or 32-bit values"),
        (_tiff(WIDE_GREY.astype(np.int16), 16, sample_format=2), "has signed or 32-bit values"),
        (_encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "has float values from 0 to 255, and only 0"),
        (_encoded(Image.fromarray(-GREY.astype(np.float32) / 255), "TIFF"), "has float values from -1 to"),
        (_encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "has float values from nan to nan"),
    ],
)
def test_values_whose_white_is_not_known_are_refused(content, message):
    with pytest.raises(UserError, match=rf"^embedded image of \d+ bytes {message}") as caught:
        load_image(content, None, **LIMITS)
    assert "8 bits" in str(caught.value)


def _half_clear(mode: str) -> Image.Image:
    image = Image.new("RGBA", (16, 16), (200, 100, 50, 255))
    image.paste((10, 20, 30, 0), (0, 0, 8, 16))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (_encoded(_half_clear("RGBA")), [TRANSPARENT]),
        (_encoded(_half_clear("LA")), [TRANSPARENT]),
        (_encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)), [TRANSPARENT]),
        (_encoded(Image.new("P", (4, 4)), transparency=0), [TRANSPARENT]),
        (_encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 255))), []),
        (_encoded(Image.new("P", (4, 4)), transparency=9), []),
        (_encoded(Image.new("L", (4, 4))), []),
        (_encoded(Image.new("RGB", (4, 4)), "JPEG"), []),
    ],
)
def test_transparency_is_remarked_where_there_is_some(content, found):
    assert image_remarks(content, None, SPEC) == found


def test_transparent_places_show_what_is_stored_there_as_in_llava():
    image = load_image(_encoded(_half_clear("RGBA")), None, **LIMITS)
    assert image[8, 2].tolist() == [10, 20, 30]
    assert image[8, 14].tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_places_are_white_where_that_is_set(mode):
    half = _half_clear("RGBA").convert(mode) if mode != "P" else _half_clear("RGBA").quantize()
    spec = dataclasses.replace(SPEC, transparency="white")
    content = _encoded(half)
    image = load_tiles(content, None, spec, max_pixels=1000)[0]
    assert image[8, 2].tolist() == [255, 255, 255]
    assert image[8, 14].tolist() != [255, 255, 255]
    assert image_remarks(content, None, spec) == []


def test_half_transparent_is_mixed_with_white():
    content = _encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 51)))
    spec = dataclasses.replace(SPEC, transparency="white")
    assert load_tiles(content, None, spec, max_pixels=1000)[0, 8, 8].tolist() == [204, 204, 204]


@pytest.mark.parametrize(("orientation", "found"), [(1, []), (3, [TURNED]), (6, [TURNED]), (9, [])])
def test_an_orientation_is_remarked(orientation, found):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert image_remarks(_encoded(Image.new("RGB", (4, 4)), "JPEG", exif=exif), None, SPEC) == found


def test_an_orientation_that_is_applied_is_not_remarked():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = _encoded(Image.new("RGB", (4, 4)), "JPEG", exif=exif)
    assert image_remarks(content, None, dataclasses.replace(SPEC, exif="apply")) == []


def test_a_broken_exif_block_is_no_reason_to_complain():
    content = _encoded(Image.new("RGB", (4, 4)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert image_remarks(content, None, SPEC) == []
    assert load_image(content, None, **LIMITS).shape == (16, 16, 3)


def test_an_inspection_says_how_many_images_of_a_domain(tmp_path, tokenizer):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    images = {
        "a.png": _encoded(Image.fromarray(WIDE_GREY)),
        "b.png": _encoded(_half_clear("RGBA")),
        "c.jpg": _encoded(Image.new("RGB", (4, 4)), "JPEG", exif=exif),
        "d.png": _encoded(Image.new("RGB", (4, 4))),
    }
    for name, content in images.items():
        (tmp_path / name).write_bytes(content)
    data = DataConfig(domains=(DomainConfig("d", write(tmp_path, "d", [record(n, image=n) for n in images])),))
    printed = str(check.inspect(data, open_loader(data, tokenizer, image=IMAGE)))
    for remark in (WIDE, TRANSPARENT, TURNED):
        assert f"d: 1 of 4 images {REMARKS[remark]}" in printed
