"""Pixels against LLaVA's processing, and images that must be refused."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.data import urls
from mole_jax.data.image import (
    FORMATS,
    MISSING_FORMATS,
    OPTIONAL_FORMATS,
    check_image,
    image_size,
    load_image,
    load_tiles,
    square_spec,
)
from mole_jax.data.tiling import pictures
from mole_jax.errors import UserError
from mole_jax.image_spec import AnyRes

LIMITS = {"size": 8, "aspect": "pad", "max_pixels": 10_000}


@pytest.mark.parametrize("name", ["waterview", "extreme_ironing"])
@pytest.mark.parametrize(("aspect", "key"), [("pad", "pad_u8"), ("crop", "center_crop_u8")])
def test_pixels_are_llavas(reference, name, aspect, key):
    folder = reference("images")
    with np.load(folder / "expected.npz") as expected:
        wanted = expected[f"{name}/{key}"].transpose(1, 2, 0).astype(int)
    image = load_image(f"{name}.png", folder, size=336, aspect=aspect, max_pixels=50_000_000)
    difference = np.abs(image.astype(int) - wanted)
    assert image.dtype == np.uint8
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_normalisation_constants(reference):
    with np.load(reference("images") / "expected.npz") as expected:
        np.testing.assert_allclose(CLIP_MEAN, expected["mean"])
        np.testing.assert_allclose(CLIP_STD, expected["std"])
        row = expected["waterview/pad_u8"][:, 100].astype(np.float64) / 255
        normal = (row - np.array(CLIP_MEAN)[:, None]) / np.array(CLIP_STD)[:, None]
        np.testing.assert_allclose(normal, expected["waterview/pad_f32_row100"], atol=1e-5)


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_padding_has_the_mean_colour_and_keeps_the_image_in_the_middle():
    image = load_image(_encoded(Image.new("RGB", (8, 4), (1, 2, 3)), "PNG"), None, **LIMITS)
    assert image[0, 0].tolist() == [122, 116, 104]
    assert image[-1, -1].tolist() == [122, 116, 104]
    assert image[2:6].reshape(-1, 3).tolist() == [[1, 2, 3]] * 32


def test_crop_takes_the_centre():
    wide = Image.new("RGB", (24, 8), (255, 0, 0))
    wide.paste((0, 0, 255), (8, 0, 16, 8))
    image = load_image(_encoded(wide, "PNG"), None, size=8, aspect="crop", max_pixels=1000)
    assert np.unique(image.reshape(-1, 3), axis=0).tolist() == [[0, 0, 255]]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_modes_become_rgb(mode):
    image = load_image(_encoded(Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode), "PNG"), None, **LIMITS)
    assert image.tolist() == np.full((8, 8, 3), 255).tolist()


def test_cmyk_becomes_rgb():
    image = load_image(_encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "TIFF"), None, **LIMITS)
    assert image.max() == 0


def test_exif_orientation_is_ignored():
    turned = Image.new("RGB", (8, 8), (0, 0, 0))
    turned.paste((255, 255, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[274] = 6
    plain, marked = (_encoded(turned, "PNG", **options) for options in ({}, {"exif": exif}))
    assert Image.open(io.BytesIO(marked)).getexif()[274] == 6
    np.testing.assert_array_equal(load_image(marked, None, **LIMITS), load_image(plain, None, **LIMITS))


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = _encoded(Image.effect_noise((40, 40), 50).convert("RGB"), "PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as one of JPEG"),
        (b"no image at all", "cannot be read as one of JPEG"),
        (GOOD[: len(GOOD) // 2], "is broken"),
        (_encoded(Image.effect_noise((40, 40), 50), "JPEG")[:300], "is broken|cannot be read"),
        (_png_header(101, 100), "101 x 100 pixels, over data.max_image_pixels 10000; scale it down or raise"),
        (_png_header(60_000, 60_000), "too large|over data.max_image_pixels"),
        (_png_header(9_000, 1), "9000 x 1 pixels, too long and thin"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot be read as one of"),
    ],
)
@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_a_broken_or_oversized_image_is_refused(content, message, aspect):
    with pytest.raises(UserError, match=message) as caught:
        load_image(content, None, size=100, aspect=aspect, max_pixels=10_000)
    assert "\n" not in str(caught.value)
    assert f"embedded image of {len(content)} bytes" in str(caught.value)


def test_eps_stays_off_the_list_of_formats():
    assert "EPS" not in FORMATS


@pytest.fixture
def root(tmp_path):
    inside = tmp_path / "images"
    (inside / "sub").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    Image.new("RGB", (4, 4)).save(inside / "sub" / "good.png")
    os.symlink(tmp_path / "secret.png", inside / "link.png")
    os.symlink(inside / "loop.png", inside / "loop.png")
    return inside


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../secret.png", r"'\.\./secret\.png' leaves its folder"),
        ("sub/../../secret.png", "leaves its folder"),
        ("link.png", "leaves its folder .* through a symbolic link"),
        ("loop.png", "cannot be followed|does not exist"),
        ("none.png", "'none.png' does not exist in .*images"),
        ("sub", "'sub' does not exist"),
        ("", "is not a path"),
        ("a\0b", "is not a path"),
    ],
)
@pytest.mark.parametrize("read", [load_image, check_image])
def test_a_path_that_leaves_its_folder_or_misses_is_refused(root, path, message, read):
    with pytest.raises(UserError, match=message):
        read(path, root, **LIMITS)


def test_an_absolute_path_inside_its_folder_is_as_good_as_a_relative_one(root, tmp_path):
    wanted = load_image("sub/good.png", root, **LIMITS)
    other = tmp_path / "other"
    os.symlink(root, other)
    for folder in (root, other, os.path.relpath(root)):
        for path in (root / "sub" / "good.png", os.path.abspath(folder) + "/sub/good.png"):
            np.testing.assert_array_equal(load_image(str(path), folder, **LIMITS), wanted)


@pytest.mark.parametrize("read", [load_image, check_image])
def test_an_absolute_path_that_leaves_its_folder_is_refused(root, read):
    for path in (root.parent / "secret.png", root / ".." / "secret.png", root / "link.png", "/dev/zero", "/"):
        with pytest.raises(UserError, match=r"leaves its folder|does not exist"):
            read(str(path), root, **LIMITS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "iVBORw0KGgo" * 1000,
            r"at most 255 bytes .*; if it is the image itself \(base64\), write data:;base64, before it",
        ),
        ("ä" * 128, "a name in one has at most 255 bytes"),
        ("/9j/4AAQSkZJ" * 1000, "is no path, .* if it is the image itself"),
        ("a/" * 1500, r"cannot be followed|does not exist"),
        ("half \ud83d", r"cannot be followed|does not exist"),
    ],
)
@pytest.mark.parametrize("read", [load_image, check_image])
def test_what_is_no_name_of_a_file_is_told_shortly(root, path, message, read):
    with pytest.raises(UserError, match=message) as caught:
        read(path, root, **LIMITS)
    assert len(str(caught.value)) < 800


def test_a_path_needs_a_folder():
    with pytest.raises(UserError, match="set image_root"):
        load_image("a.png", None, **LIMITS)


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:;base64,", "DATA:image/png;charset=x;BASE64,"])
@pytest.mark.parametrize("read", [load_image, check_image])
def test_a_data_url_is_the_image_in_it(head, read):
    read(head + base64.encodebytes(GOOD).decode(), None, **LIMITS)  # in lines of 76 characters, as MIME wraps it
    np.testing.assert_array_equal(
        load_image(head + base64.b64encode(GOOD).decode(), None, **LIMITS), load_image(GOOD, None, **LIMITS)
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,iVBORw0", r"is not base64 \(cut off\?\); encode the image again"),
        ("data:image/png;base64,%%%%", "is not base64"),
        ("data:image/png;base64,", "holds nothing"),
        ("data:image/png,iVBORw0KGgo=", "is no data:TYPE;base64,TEXT; write it so"),
        ("data:image/png;base64", "is no data:TYPE;base64,TEXT; write it so"),
        ("data:;base64,bm8gaW1hZ2U=", "cannot be read as one of JPEG"),
        ("https://example.com/a.png", "is on the web, .*; download it first"),
        ("HTTP://example.com/a.png", "is on the web, .*; download it first"),
    ],
)
@pytest.mark.parametrize("read", [load_image, check_image])
def test_a_url_without_an_image_is_refused(url, message, read, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        read(url, tmp_path, **LIMITS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [load_image, check_image])
def test_a_data_url_has_a_limit(monkeypatch, read):
    monkeypatch.setattr(urls, "MOST_CHARACTERS", 100)
    with pytest.raises(UserError, match="characters, over 100; write the image to a file"):
        read("data:;base64," + base64.b64encode(GOOD).decode(), None, **LIMITS)


@pytest.mark.parametrize("kind", OPTIONAL_FORMATS)
@pytest.mark.parametrize("read", [load_image, check_image])
def test_formats_that_pillow_may_lack_are_read(kind, read):
    if kind in MISSING_FORMATS:
        pytest.skip(f"this Pillow was built without {kind}")
    white = _encoded(Image.new("RGB", (8, 8), (255, 255, 255)), kind)
    assert Image.open(io.BytesIO(white)).format == kind
    read(white, None, **LIMITS)
    assert load_image(white, None, **LIMITS).min() >= 254


@pytest.mark.parametrize("read", [load_image, check_image])
def test_what_pillow_lacks_is_told(monkeypatch, read):
    monkeypatch.setattr("mole_jax.data.image.MISSING_FORMATS", ("AVIF",))
    with pytest.raises(UserError, match=r"replace it or take the record out \(this Pillow was built without AVIF\)"):
        read(b"no image at all", None, **LIMITS)


def _spec(**settings):
    return dataclasses.replace(square_spec(8, "stretch"), **settings)


def _turned(orientation: int, kind: str = "JPEG") -> bytes:
    """Two halves, black left and white right, 12 x 8, that a viewer turns."""
    image = Image.new("RGB", (12, 8))
    image.paste((255, 255, 255), (6, 0, 12, 8))
    exif = Image.Exif()
    exif[274] = orientation
    return _encoded(image, kind, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_an_orientation_is_applied_as_pillow_does(orientation, kind):
    content, spec = _turned(orientation, kind), _spec(exif="apply")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert image_size(content, None, spec, max_pixels=1000) == upright.size
    pixels = load_tiles(content, None, spec, max_pixels=1000)[0]
    np.testing.assert_array_equal(pixels, load_tiles(_encoded(upright, "PNG"), None, spec, max_pixels=1000)[0])
    if kind != "TIFF":
        assert image_size(content, None, _spec(), max_pixels=1000) == (12, 8)


def test_a_turned_image_is_cut_into_the_tiles_of_its_turned_size():
    tiling = AnyRes(((8, 16), (16, 8)))
    for exif, size, best in (("ignore", (12, 8), (8, 16)), ("apply", (8, 12), (16, 8))):
        spec = dataclasses.replace(_spec(exif=exif), side=2, tiling=tiling)
        content = _turned(6)
        assert image_size(content, None, spec, max_pixels=1000) == size
        tiles = load_tiles(content, None, spec, max_pixels=1000)
        assert len(tiles) == pictures.layouts(spec, [size], "<image>")[0].tiles == 3, best


def test_a_broken_exif_block_turns_nothing():
    content = _encoded(Image.new("RGB", (4, 4)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert load_tiles(content, None, _spec(exif="apply"), max_pixels=100).shape == (1, 8, 8, 3)


def test_a_message_does_not_quote_an_image():
    with pytest.raises(UserError) as caught:
        load_image("data:image/png;base64," + "A" * 10**6, None, **LIMITS)
    assert len(str(caught.value)) < 300


def test_a_page_of_a_tiff(tmp_path):
    pages = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 20, 30)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for name, shade in (("a.tif", 10), ("a.tif.0", 10), ("a.tif.2", 30)):
        assert load_image(name, tmp_path, **LIMITS)[0, 0].tolist() == [shade, 0, 0]
    Image.new("RGB", (8, 8), (0, 50, 0)).save(tmp_path / "a.tif.1", "PNG")
    assert load_image("a.tif.1", tmp_path, **LIMITS)[0, 0].tolist() == [0, 50, 0]
    with pytest.raises(UserError, match=r"'a\.tif\.3' is page 3 of a file of 3 page\(s\), counted from 0"):
        load_image("a.tif.3", tmp_path, **LIMITS)
    with pytest.raises(UserError, match=r"'b\.tif\.3' does not exist"):
        load_image("b.tif.3", tmp_path, **LIMITS)
    with pytest.raises(UserError, match="leaves its folder"):
        load_image("../a.tif.0", tmp_path / "x", **LIMITS)
