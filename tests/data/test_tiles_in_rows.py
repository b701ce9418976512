"""From records to rows of tiles: the goldens' conversations as LLaVA records, packed and not, counted and refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from mole_jax.config import DataConfig, DomainConfig, TaskConfig
from mole_jax.data.desk import check, show
from mole_jax.data.desk.opened import open_loader
from mole_jax.data.held_out import held_out_batches, questions
from mole_jax.data.image import image_size, load_tiles
from mole_jax.data.mixture import Mixture
from mole_jax.data.tiling.pictures import cut
from mole_jax.errors import UserError
from mole_jax.image_spec import NEWLINE, Single
from mole_jax.tokenizer import Tokenizer
from tests.data.domains_on_disk import same, write
from tests.data.families import CASES, SPECS, Golden
from tests.data.test_template import LLAVA_15, turns_of

CUT = [name for name in SPECS if not isinstance(SPECS[name].tiling, Single)]
SIDES = {"user": "human", "assistant": "gpt", "system": "system"}


@pytest.fixture(params=CUT)
def golden(request, reference) -> Golden:
    return Golden(reference(f"families/{request.param}"))


@pytest.fixture
def records(tmp_path):
    """Returns a function that writes a golden's conversations as records, with their pictures."""

    def make(golden: Golden) -> DataConfig:
        raws = []
        for case in golden.cases.values():
            turns = [{"from": SIDES[role], "value": text} for role, text in turns_of(case)]
            raws.append({"id": case["name"], "conversations": turns, "image": case["pictures"]})
            for name in case["pictures"]:
                shutil.copy(golden.folder / name, tmp_path)
        domain = DomainConfig("golden", write(tmp_path, "golden", raws))
        return DataConfig(domains=(domain,), sequence_length=400, tiles_per_row=24, packing_bins=2)

    return make


def build(golden: Golden, data: DataConfig, **more) -> Mixture:
    settings = {"seed": 0, "rows": 1, "epochs": 1.0, **more}
    return Mixture.build(data, tokenizer=Tokenizer.load(golden.folder), image=golden.spec, **settings)


def all_of(mixture: Mixture) -> list:
    """The batches of all epochs; after them come empty ones."""
    return [next(mixture) for _ in range(mixture.count_batches())]


def received(golden: Golden, batch, row: int) -> dict[str, np.ndarray]:
    """What the image positions of each example get if a tile's features are its pixels' mean and their number."""
    count = golden.spec.tile_features
    means = batch.images[row].astype(float).mean((1, 2, 3))
    features = (means[:, None] * 1000 + np.arange(count)).reshape(-1)
    # The last one, so that index -1 means the newline.
    values = np.append(features, -1.0)[batch.sources[row]]
    given = (values * batch.weights[row]).sum(-1)
    found = {}
    for number, name in enumerate(batch.record_ids[row], start=1):
        own = batch.segment_ids[row] == number
        assert (batch.weights[row][own & (batch.tokens[row] != golden.spec.token_id)] == 0).all()
        found[name] = given[own & (batch.tokens[row] == golden.spec.token_id)]
    return found


def test_rows_hold_the_goldens_tokens_tiles_and_places(golden, records):
    data = dataclasses.replace(records(golden), examples_per_row=1)
    seen = []
    for batch in all_of(build(golden, data)):
        name = batch.record_ids[0][0].removeprefix("golden/")
        seen.append(name)
        expected = golden.expected[f"{name}/input_ids"]
        np.testing.assert_array_equal(batch.tokens[0, : len(expected)], expected)
        assert (batch.segment_ids[0, len(expected) :] == 0).all()
        pictures = golden.pictures(name)
        tiles = [tile for one in pictures for tile in cut(one, golden.spec, len(pictures))]
        np.testing.assert_array_equal(batch.images[0, : len(tiles)], np.array(tiles).reshape(-1, 56, 56, 3))
        assert not batch.images[0, len(tiles) :].any()
        assert batch.sources.shape == batch.weights.shape == (1, 400, 4 if golden.name == "llava_onevision" else 1)
        assert (batch.sources.dtype, batch.weights.dtype) == (np.int32, np.float32)
        at = batch.tokens[0] == golden.spec.token_id
        np.testing.assert_allclose(batch.weights[0][at].sum(-1), 1, rtol=1e-6)
        assert set(np.unique(batch.sources[0][at])) <= {NEWLINE, *range(len(tiles) * golden.spec.tile_features)}
    assert sorted(seen) == sorted(CASES)


def test_an_example_gets_the_same_features_packed_and_alone(golden, records):
    data = records(golden)
    alone, packed = {}, {}
    for found, each in ((alone, 1), (packed, 4)):
        for batch in all_of(build(golden, dataclasses.replace(data, examples_per_row=each, sequence_length=700))):
            found |= received(golden, batch, 0)
    assert len(packed) == 4
    for name, values in alone.items():
        np.testing.assert_allclose(packed[name], values)


def test_rows_have_room_for_tiles_as_for_tokens(golden, records):
    tiles = [sum(len(cut(one, golden.spec)) for one in golden.pictures(case)) for case in CASES]
    room = max(tiles)
    data = dataclasses.replace(records(golden), tiles_per_row=room, sequence_length=900)
    mixture = build(golden, data)
    batches = all_of(mixture)
    used = [int(batch.images[0].any((1, 2, 3)).sum()) for batch in batches]
    assert len(used) > 1
    assert sum(used) == sum(tiles)
    report = mixture.report(mixture.get_state())
    assert report["tile_fill_rate"] == pytest.approx(sum(tiles) / (room * len(used)))
    # Counting looked at sizes alone, and was right.
    assert sum(len(batch.record_ids[0]) for batch in batches) == 4
    assert not next(mixture).record_ids[0]


def test_a_picture_of_more_tiles_than_a_row_has_is_told_and_can_be_limited(golden, records):
    data = dataclasses.replace(records(golden), tiles_per_row=6, on_too_long="error")
    message = (
        r"\d+ tiles of [12] image\(s\), over data.tiles_per_row 6; raise that, or set data.max_tiles to at most [36]"
    )
    with pytest.raises(UserError, match=message):
        all_of(build(golden, data))
    skipping = build(golden, dataclasses.replace(data, on_too_long="skip"))
    assert any(batch.record_ids[0] for batch in all_of(skipping))
    assert list(skipping.skipped) == ["too many tiles"]
    limited = dataclasses.replace(data, max_tiles=3)
    names = [name for batch in all_of(build(golden, limited)) for name in batch.record_ids[0]]
    assert sorted(names) == sorted(f"golden/{case}" for case in CASES)


def test_a_mixture_of_tiles_resumes(reference, records):
    golden = Golden(reference("families/llava_onevision"))
    data = records(golden)
    mixture, again = (build(golden, data, epochs=None) for _ in range(2))
    next(mixture)
    state = json.loads(json.dumps(mixture.get_state()))
    again.set_state(state)
    assert all(same(next(mixture), next(again)) for _ in range(3))
    other = dataclasses.replace(data, max_tiles=5)
    with pytest.raises(UserError, match="tiling was AnyRes"):
        build(golden, other, epochs=None).set_state(state)


def test_worker_processes_make_the_same_rows(reference, records):
    golden = Golden(reference("families/smolvlm"))
    data = records(golden)
    mixture = build(golden, dataclasses.replace(data, workers=1))
    try:
        assert all(same(a, next(mixture)) for a in all_of(build(golden, data)))
    finally:
        mixture.close()


def test_held_out_rows_and_questions_have_their_places(golden, records):
    data = records(golden)
    task = TaskConfig("golden", data.domains[0].path)
    known = {"tokenizer": Tokenizer.load(golden.folder), "image": golden.spec}
    (batch,) = held_out_batches(task, data, rows=5, **known)
    assert batch.sources.shape[:2] == (5, 400)
    assert not batch.weights[4].any()
    for row, one in enumerate(questions(task, data, **known)):
        np.testing.assert_array_equal(one.tokens, golden.expected[f"{one.id}/prompt_ids"])
        assert len(one.sources) == len(one.weights) == len(one.tokens)
        np.testing.assert_array_equal(one.sources, batch.sources[row, : len(one.tokens)])
        np.testing.assert_array_equal(one.images, batch.images[row, : len(one.images)])


def test_the_preview_shows_the_checkpoints_words_and_its_marks(reference, records):
    golden = Golden(reference("families/smolvlm"))
    data = records(golden)
    loader = open_loader(data, Tokenizer.load(golden.folder), golden.spec)
    shown = show.show(loader.load(0, 0), loader)
    assert shown.startswith(
        "golden/wide: 68 tokens, 6 supervised, 1 image(s)\n<|im_start|>User:<fake_token_around_image>"
    )
    assert "<row_2_col_3> <image: 4 positions> \n\n<fake_token_around_image><global-img> <image: 4 positions> " in shown
    assert shown.endswith("Assistant:⟦ A man ironing clothes.<end_of_utterance>⟧\n")
    counted = str(check.inspect(data, loader))
    assert "golden: 34 tiles of 4 images, 20 at most of one record" in counted
    assert counted.endswith("no problems")


def test_settings_that_do_not_go_with_a_base_are_refused(reference, records):
    golden = Golden(reference("families/smolvlm"))
    data = records(golden)
    with pytest.raises(UserError, match=r"data.prompt v1 has no words for the marks around the tiles"):
        build(golden, dataclasses.replace(data, prompt="v1"))
    with pytest.raises(UserError, match=r"data.image_aspect pad is for models that see an image as one square"):
        build(golden, dataclasses.replace(data, image_aspect="pad"))


def test_a_preset_asks_a_base_that_cuts_images_too(reference, records):
    golden = Golden(reference("families/llava_next_vicuna"))
    data = dataclasses.replace(records(golden), prompt="no_system", examples_per_row=1)
    for batch in all_of(build(golden, data)):
        if batch.record_ids == [["golden/wide"]]:
            found = (batch.tokens == 6).sum()
    assert found == (golden.expected["wide/input_ids"] == 6).sum()


def test_a_system_turn_stands_in_the_row(reference, tmp_path):
    golden = Golden(reference("families/internvl"))
    turns = [("system", "Be brief."), ("human", "What?"), ("gpt", "That.")]
    raw = {"id": "a", "conversations": [{"from": side, "value": text} for side, text in turns]}
    data = DataConfig(domains=(DomainConfig("d", write(tmp_path, "d", [raw])),), sequence_length=100)
    loader = open_loader(data, Tokenizer.load(golden.folder), golden.spec)
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user" in show.show(loader.load(0, 0), loader)
    preset = open_loader(dataclasses.replace(data, prompt="v1"), Tokenizer.load(golden.folder), SPECS["llava_qwen2"])
    with pytest.raises(UserError, match="the prompt preset v1 has no place for a system turn; take it out"):
        preset.load(0, 0)


def test_an_end_that_the_template_does_not_write_is_told(reference, tmp_path):
    golden = Golden(reference("families/llava_next_vicuna"))
    shutil.copytree(golden.folder, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(LLAVA_15)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    path = write(tmp_path, "d", [{"id": "a", "conversations": turns}])
    data = DataConfig(domains=(DomainConfig("d", path),), sequence_length=100)
    loader = open_loader(data, Tokenizer.load(tmp_path / "base"), golden.spec)
    assert "base writes no token where an answer ends, so </s> takes the place" in str(check.inspect(data, loader))
    assert show.show(loader.load(0, 0), loader).endswith("\nUSER: What? ASSISTANT:⟦ That.</s>⟧")


def test_a_picture_too_thin_to_be_cut_is_a_bad_image(reference, tmp_path):
    golden = Golden(reference("families/llava_onevision"))
    Image.new("RGB", (1, 9000)).save(tmp_path / "thin.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    raw = {"id": "a", "image": "thin.png", "conversations": turns}
    data = DataConfig(domains=(DomainConfig("d", write(tmp_path, "d", [raw])),), sequence_length=100)
    inspection = check.inspect(data, open_loader(data, Tokenizer.load(golden.folder), golden.spec))
    assert [problem.reason for problem in inspection.problems] == ["bad image"]
    assert re.search(
        r"d\.json: record 0 \(id 'a'\), field image: 1 x 9000 pixels are too long and thin", str(inspection)
    )


def test_a_size_told_before_decoding_is_that_of_the_pixels(tmp_path):
    """Pillow turns a TIFF as it says; the layout is made from its size before."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 120)).save(tmp_path / "turned.tif", exif=exif)
    spec = SPECS["internvl"]
    size = image_size("turned.tif", tmp_path, spec, max_pixels=10**6)
    with Image.open(tmp_path / "turned.tif") as opened:
        opened.load()
        assert size == opened.size
    assert len(load_tiles("turned.tif", tmp_path, spec, max_pixels=10**6)) == 4
