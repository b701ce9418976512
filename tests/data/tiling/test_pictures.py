"""Tiles and layouts against transformers: the goldens, its PIL processors run here, and sums done by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mole_jax.data.tiling.pictures import cut, layout, layouts, limited, most_tiles, taps
from mole_jax.errors import UserError
from mole_jax.image_spec import NEWLINE, AnyRes, Grid, ImageSpec, Single, Split
from tests.data.families import CASES, SPECS, Golden

SIZES = [(300, 120), (90, 260), (200, 210), (40, 30), (56, 56), (57, 56), (1, 1), (640, 481), (31, 333), (112, 168)]
"""Pictures of every kind of shape, and sizes that fit exactly."""


@pytest.fixture(params=SPECS)
def golden(request, reference) -> Golden:
    return Golden(reference(f"families/{request.param}"))


@pytest.fixture(scope="session")
def processor(reference):
    """Returns a function from a family to transformers' PIL image processor of its golden."""
    transformers = pytest.importorskip("transformers")
    return lambda name: transformers.AutoImageProcessor.from_pretrained(reference(f"families/{name}"), backend="pil")


def noise(size: tuple[int, int]) -> Image.Image:
    values = np.random.default_rng(size[0] * 1000 + size[1]).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def theirs(name: str, processor, pictures: list[Image.Image], nested: bool = False) -> tuple[np.ndarray, list[int]]:
    """Returns what transformers makes of pictures, as levels of uint8 (N, H, W, 3), and the tiles of each."""
    spec = SPECS[name]
    given = [pictures] if nested or name == "smolvlm" else pictures
    out = processor(images=given, return_tensors="np")
    values = np.asarray(out["pixel_values"], np.float64)
    if name == "smolvlm":
        flat = values[0]
    elif values.ndim == 5:
        flat = np.concatenate([one[: _filled(one)] for one in values])
    else:
        flat = values
    return 255 * (np.moveaxis(flat, 1, -1) * np.array(spec.std) + np.array(spec.mean)), list(map(len, values))


def _filled(tiles: np.ndarray) -> int:
    """transformers fills up with tiles of zeros; a real one is zero nowhere near everywhere."""
    return int(np.flatnonzero(np.abs(tiles).max((1, 2, 3)) > 0)[-1]) + 1


@pytest.mark.parametrize("case", CASES[:-1])
def test_tiles_and_positions_are_those_of_the_golden(golden, case):
    pictures = golden.pictures(case)
    found = layouts(golden.spec, [one.size for one in pictures], "<image>")
    tiles = [cut(one, golden.spec, len(pictures)) for one in pictures]
    assert [len(one) for one in tiles] == [one.tiles for one in found]
    expected = golden.pixels(case)
    if expected.ndim == 5:  # (pictures, tiles, H, W, 3), filled up
        expected = np.concatenate([one[: len(own)] for one, own in zip(expected, tiles, strict=True)])
    np.testing.assert_allclose(np.concatenate(tiles), expected, atol=1e-3)
    positions = sum(sum(one.runs) for one in found)
    assert positions == (golden.expected[f"{case}/input_ids"] == golden.spec.token_id).sum()
    assert positions == len(golden.expected[f"{case}/image_features"])
    for one in found:
        assert sum(one.runs) == len(one.source)
        assert one.source.dtype == np.int32
        assert one.source.min() >= -1
        assert one.source.max() < one.tiles * golden.spec.tile_features


@pytest.mark.parametrize("name", [name for name in SPECS if name not in ("llava_qwen3", "llava_next_vicuna")])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_transformers(name, size, processor):
    picture, spec = noise(size), SPECS[name]
    mine = cut(picture, spec)
    expected, _ = theirs(name, processor(name), [picture])
    assert mine.shape == expected.shape
    assert len(mine) == layout(spec, size, 1, "<image>").tiles <= most_tiles(spec)
    np.testing.assert_allclose(mine, expected, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["llava_next_mistral", "llava_onevision"]), st.integers(20, 700), st.integers(20, 700))
def test_positions_are_as_many_as_transformers_counts(name, width, height):
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    spec = SPECS[name]
    kind = LlavaNextProcessor if name == "llava_next_mistral" else LlavaOnevisionProcessor
    # The arithmetic alone: it needs a processor's settings, not its parts.
    settings_ = type("Settings", (), {"_get_unpadded_features": kind._get_unpadded_features})()
    settings_.patch_size, settings_.num_additional_image_tokens = 14, 0
    settings_.num_image_tokens, settings_.vision_aspect_ratio = 16, "anyres_max_4"
    settings_.image_processor = type("P", (), {"image_grid_pinpoints": [list(r) for r in spec.tiling.resolutions]})()
    counted = kind._get_number_of_features(settings_, height, width, 56, 56)
    assert sum(layout(spec, (width, height), 1, "<image>").runs) == counted


def test_a_grid_is_read_row_by_row_with_a_newline_after_each():
    """Two tiles side by side of 2 x 2 features each: the base view is 0-3, the left tile 4-7, the right one 8-11."""
    spec = ImageSpec(8, 2, 9, tiling=AnyRes(((8, 16),)))
    found = layout(spec, (16, 8), 1, "<image>")
    expected = [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]
    assert (found.tiles, found.runs, found.source[:, 0].tolist(), found.weight) == (3, (14,), expected, None)


def test_features_of_padding_are_left_out_and_those_outside_the_grid_too():
    """A picture twice as wide as high on a square of 2 x 2 tiles: the first and the last row of four are padding."""
    spec = ImageSpec(8, 2, 9, first=1, tiling=AnyRes(((16, 16),)))
    found = layout(spec, (16, 8), 1, "<image>")
    # Tile t begins at 5 t with its class token; of the upper tiles (1, 2) the lower row is left, of 3 and 4 the upper.
    upper, lower = [8, 9, 13, 14], [16, 17, 21, 22]
    assert found.source[:, 0].tolist() == [0, 1, 2, 3, 4, *upper, NEWLINE, *lower, NEWLINE]


def test_a_map_is_shrunk_by_the_shares_of_a_bilinear_resize():
    """4 x 4 features to those of one tile, 2 x 2: centres fall between two, so each is the mean of four."""
    spec = ImageSpec(8, 2, 9, tiling=AnyRes(((16, 16),), most=1))
    found = layout(spec, (16, 16), 1, "<image>")
    assert found.runs == (4 + 2 * 3,)
    assert found.weight is not None
    # Left of the upper row of the map: the four features of the upper left tile (tile 1).
    assert sorted(found.source[4].tolist()) == [4, 5, 6, 7]
    assert found.weight[4].tolist() == [0.25] * 4
    assert found.source[6, 0] == NEWLINE
    assert found.weight[6].tolist() == [1, 0, 0, 0]
    assert found.weight.sum(-1) == pytest.approx(1)


def test_the_shares_are_those_of_interpolate_without_aligned_corners():
    """16 places become 9 as PIL's and torch's bilinear do without antialiasing: centre (i + 0.5) 16/9 - 0.5."""
    spec = SPECS["llava_onevision"]
    found = layout(spec, (224, 224), 1, "<image>")
    assert found.weight is not None
    side = 8  # sqrt(16 * 16 / (4 * 4 * 4)) = 2, 16 // 2
    assert found.runs == (16 + side * (side + 1),)
    values = np.zeros((17, 16))
    y, x = np.indices((16, 16))
    plane = 3.0 * y + 0.5 * x  # a plane stays one under any linear interpolation
    values[1 + y // 4 * 4 + x // 4, y % 4 * 4 + x % 4] = plane
    got = (values.reshape(-1)[found.source] * found.weight).sum(-1)[16:].reshape(side, side + 1)[:, :-1]
    centre = (np.arange(side) + 0.5) * 2 - 0.5
    np.testing.assert_allclose(got, 3 * centre[:, None] + 0.5 * centre[None], rtol=1e-6)


@pytest.mark.parametrize("size", [(300, 40), (41, 300), (500, 470)])
def test_a_shrunk_map_is_the_one_that_scipy_resizes(size):
    """scipy's order-1 zoom on a grid of pixels has torch's rule for centres."""
    from scipy.ndimage import map_coordinates

    tiling = dataclasses.replace(SPECS["llava_onevision"].tiling, most=1)
    spec = dataclasses.replace(SPECS["llava_onevision"], tiling=tiling)
    whole = layout(dataclasses.replace(spec, tiling=dataclasses.replace(tiling, most=None)), size, 1, "<image>")
    found = layout(spec, size, 1, "<image>")
    values = np.random.default_rng(0).normal(size=found.tiles * spec.tile_features)
    rows = int((whole.source == NEWLINE).sum())
    plane = values[whole.source[16:, 0].reshape(rows, -1)[:, :-1]]
    new = int((found.source[:, 0] == NEWLINE).sum())
    got = (values[found.source] * found.weight).sum(-1)[16:].reshape(new, -1)[:, :-1]
    at = [np.maximum((np.arange(n) + 0.5) * old / n - 0.5, 0) for n, old in zip(got.shape, plane.shape, strict=True)]
    expected = map_coordinates(plane, np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_of_several_pictures_each_stays_whole_where_transformers_nests_them(processor):
    spec = SPECS["llava_onevision"]
    spec = dataclasses.replace(spec, tiling=dataclasses.replace(spec.tiling, alone=True))
    pictures = [noise((200, 120)), noise((60, 70))]
    out = processor("llava_onevision")(images=[pictures], return_tensors="np")
    assert out["batch_num_images"].tolist() == [2]
    expected, _ = theirs("llava_onevision", processor("llava_onevision"), pictures, nested=True)
    np.testing.assert_allclose(np.concatenate([cut(one, spec, 2) for one in pictures]), expected, atol=1e-3)
    found = layout(spec, (200, 120), 2, "<image>")
    assert (found.tiles, found.runs, found.source[:, 0].tolist()) == (1, (17,), [*range(16), NEWLINE])
    assert layout(spec, (200, 120), 1, "<image>").tiles > 1


def test_the_words_of_a_split_picture():
    spec = ImageSpec(8, 1, 9, tiling=Split(16, before="<f>", whole="<g>"))
    assert layout(spec, (32, 16), 1, "<i>").text == "<f><row_1_col_1><i><f><row_1_col_2><i>\n\n<f><g><i><f>"
    small = dataclasses.replace(spec, tiling=Split(8, before="<f>", whole="<g>"))
    assert layout(small, (9, 9), 1, "<i>").text == "<f><g><i><f>"
    whole = dataclasses.replace(spec, tiling=dataclasses.replace(spec.tiling, split=False))
    assert layout(whole, (32, 16), 1, "<i>")[:3] == (1, "<f><g><i><f>", (1,))


def test_a_picture_that_is_not_split_is_transformers_own(processor):
    spec = dataclasses.replace(SPECS["smolvlm"], tiling=Split(168, split=False))
    out = processor("smolvlm")(images=[[noise((300, 120))]], do_image_splitting=False, return_tensors="np")
    expected = 255 * (np.moveaxis(out["pixel_values"][0].astype(np.float64), 1, -1) * 0.5 + 0.5)
    np.testing.assert_allclose(cut(noise((300, 120)), spec), expected, atol=1e-3)


@pytest.mark.parametrize("size", [(9000, 9000), (5000, 70)])
def test_no_side_is_over_4096_pixels(size, processor):
    tiled = dataclasses.replace(SPECS["smolvlm"], tiling=Split(5000))
    assert layout(tiled, size, 1, "<i>").tiles <= most_tiles(tiled) == 74**2 + 1


@pytest.mark.parametrize("name", ["llava_next_mistral", "llava_onevision", "smolvlm", "internvl"])
@pytest.mark.parametrize("most", [3, 4, 5, 7, 12, 100])
def test_a_limit_holds_for_every_picture_and_is_one_of_the_processor(name, most, processor):
    spec = limited(SPECS[name], most)
    assert most_tiles(spec) <= most
    if most >= most_tiles(SPECS[name]):
        assert spec == SPECS[name]
    own = processor(name)
    match spec.tiling:
        case AnyRes(resolutions):
            own.image_grid_pinpoints = [list(one) for one in resolutions]
        case Split(longest):
            own.size = {"longest_edge": longest}
        case Grid(least, tiles):
            own.min_patches, own.max_patches = least, tiles
    for size in [(300, 120), (90, 260), (200, 210)]:
        assert layout(spec, size, 1, "<image>").tiles <= most
        np.testing.assert_allclose(cut(noise(size), spec), theirs(name, own, [noise(size)])[0], atol=1e-3)


def test_a_limit_below_the_smallest_resolution_is_told():
    with pytest.raises(UserError, match=r"data\.max_tiles 1 is less than the 3 tiles of the smallest"):
        limited(SPECS["llava_next_mistral"], 1)
    assert limited(SPECS["llava_qwen2"], 1) is SPECS["llava_qwen2"]
    assert most_tiles(limited(SPECS["smolvlm"], 1)) == most_tiles(limited(SPECS["internvl"], 2)) == 1


@pytest.mark.parametrize("name", ["llava_next_mistral", "llava_onevision"])
def test_a_picture_too_thin_for_tiles_is_told(name):
    with pytest.raises(UserError, match="1 x 9000 pixels are too long and thin"):
        layout(SPECS[name], (1, 9000), 1, "<image>")


def test_how_many_features_make_a_position():
    assert [taps(SPECS[name]) for name in SPECS] == [1, 1, 1, 1, 4, 1, 1]


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_a_single_tile_is_squared_as_asked(fit):
    spec = ImageSpec(8, 1, 9, tiling=Single(), fit=fit)
    assert cut(noise((20, 10)), spec).shape == (1, 8, 8, 3)
    assert layout(dataclasses.replace(spec, first=1, vectors=True), (3, 3), 1, "<i>").runs == (4,)
