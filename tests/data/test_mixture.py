"""Packed batches: contents, determinism, resumption, skipping and counting."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data.conversation import encode
from mole_jax.data.image import load_image
from mole_jax.data.mixing import interleave
from mole_jax.data.mixture import merged
from mole_jax.data.records import parse_record
from mole_jax.errors import UserError
from mole_jax.prompts import PROMPTS
from tests.data.domains_on_disk import IMAGE, build, domain, record, same, write, write_image


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("domains")
    domains = (
        domain(folder, "photos", 9, weight=2.0),
        domain(folder, "charts", 5),
        domain(folder, "text", 4, image=False),
    )
    return DataConfig(
        domains=domains, sequence_length=400, examples_per_row=4, tiles_per_row=3, packing_bins=3, mix="weight"
    )


def segments(batch):
    """Yields (row, record id, slice) of every example of a batch, in order."""
    for row, names in enumerate(batch.record_ids):
        for number, name in enumerate(names, start=1):
            where = np.flatnonzero(batch.segment_ids[row] == number)
            assert (np.diff(where) == 1).all()
            yield row, name, slice(where[0], where[-1] + 1)


def check_batch(batch, data: DataConfig, tokenizer):
    """Compares every position of a batch with the records it came from; returns their names."""
    raws = {}
    for number, one in enumerate(data.domains):
        for i, raw in enumerate(json.loads(pathlib.Path(one.path).read_text())):
            example = parse_record(raw, file=one.path, index=i, domain=one.name)
            raws[f"{one.name}/{example.id}"] = (number, example, pathlib.Path(one.path).parent)
    used = np.zeros(batch.tokens.shape, bool)
    slots = np.zeros(len(batch.tokens), int)
    names = []
    for row, name, where in segments(batch):
        number, example, folder = raws[name]
        names.append(name)
        one = encode(example, tokenizer, PROMPTS["v1"], IMAGE)
        np.testing.assert_array_equal(batch.tokens[row, where], one.tokens)
        np.testing.assert_array_equal(batch.targets[row, where], [*one.tokens[1:], 0])
        np.testing.assert_array_equal(batch.loss_mask[row, where], [*one.loss_mask[1:], 0])
        np.testing.assert_array_equal(batch.positions[row, where], np.arange(len(one.tokens)))
        assert (batch.domain_ids[row, where] == number).all()
        used[row, where] = True
        for image in example.images:
            pixels = load_image(image, folder, size=8, aspect="pad", max_pixels=100)
            np.testing.assert_array_equal(batch.images[row, slots[row]], pixels)
            slots[row] += 1
    np.testing.assert_array_equal(batch.segment_ids > 0, used)
    assert (batch.tokens[~used] == tokenizer.pad_id).all()
    for array in (batch.targets, batch.loss_mask, batch.positions, batch.domain_ids):
        assert not array[~used].any()
    for row, count in enumerate(slots):
        assert not batch.images[row, count:].any()
    return names


def test_batches_hold_whole_examples_and_nothing_else(data, tokenizer):
    mixture = build(data, tokenizer, rows=4)
    for _ in range(6):
        batch = next(mixture)
        names = check_batch(batch, data, tokenizer)
        assert len(names) > 4, "rows are packed"
        for name, array in batch.arrays().items():
            expected = (4, 3, 8, 8, 3) if name == "images" else (4, 400)
            assert array.shape == expected, name
            assert array.dtype == (np.uint8 if name == "images" else np.int32), name
        assert "record_ids" not in batch.arrays()


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=3),
    per_row=st.integers(1, 5),
    bins=st.integers(1, 8),
    rows=st.integers(1, 4),
    epochs=st.sampled_from([0.5, 1, 2]),
    seed=st.integers(0, 9),
)
def test_of_any_mixture_every_draw_comes_once(lengths, per_row, bins, rows, epochs, seed, tokenizer, tmp_path_factory):
    """By size, e epochs are every record e times, whatever shards and packing do; then come empty rows."""
    folder = tmp_path_factory.mktemp("any")
    domains = []
    for i, words in enumerate(lengths):
        records = [
            record(str(j), answer="x" * n, image=write_image(folder, f"{i}_{j}.png", (n, i, j)) if n % 2 else None)
            for j, n in enumerate(words)
        ]
        domains.append(DomainConfig(f"d{i}", write(folder, f"d{i}", records)))
    data = DataConfig(
        domains=tuple(domains),
        mix="size",
        sequence_length=400,
        examples_per_row=per_row,
        tiles_per_row=2,
        packing_bins=bins,
    )
    mixture = build(data, tokenizer, rows=rows, seed=seed, epochs=epochs)
    names = collections.Counter()
    for _ in range(mixture.count_batches()):
        batch = next(mixture)
        assert (batch.segment_ids > 0).any(), "no batch is counted that nothing is left for"
        names.update(check_batch(batch, data, tokenizer))
    assert not next(mixture).segment_ids.any()
    mixture.close()
    drawn = collections.Counter(
        interleave(k, [len(words) for words in lengths])[0] for k in range(round(epochs * sum(map(len, lengths))))
    )
    for i, words in enumerate(lengths):
        passes, rest = divmod(drawn[i], len(words))
        counts = sorted(names[f"d{i}/{j}"] for j in range(len(words)))
        assert counts == [passes] * (len(words) - rest) + [passes + 1] * rest


def test_the_same_seed_gives_the_same_batches_and_another_gives_others(data, tokenizer):
    first, again, other = (build(data, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert all(same(next(first), next(again)) for _ in range(5))
    assert not all(same(next(first), next(other)) for _ in range(5))


def test_a_state_resumes_bit_for_bit_at_every_batch(data, tokenizer):
    whole = build(data, tokenizer, seed=5)
    batches, states = [], [whole.get_state()]
    for _ in range(12):
        batches.append(next(whole))
        states.append(json.loads(json.dumps(whole.get_state())))
    for place in (0, 1, 4, 7, 11):
        resumed = build(data, tokenizer, seed=5)
        resumed.set_state(states[place])
        assert resumed.get_state() == states[place]
        assert all(same(next(resumed), batch) for batch in batches[place:])
        assert resumed.get_state() == states[-1]
    whole.set_state(states[3])
    assert same(next(whole), batches[3])
    whole.close()
    assert same(next(whole), batches[4])


def test_workers_change_nothing_and_states_pass_between_them(data, tokenizer):
    alone, shared = build(data, tokenizer), build(dataclasses.replace(data, workers=2), tokenizer)
    for _ in range(2):
        next(alone)
    shared.set_state(alone.get_state())
    try:
        for _ in range(6):
            assert same(next(shared), next(alone))
            assert shared.get_state() == alone.get_state()
        state = json.loads(json.dumps(shared.get_state()))
        later = [next(shared) for _ in range(3)]
    finally:
        shared.close()
    resumed = build(data, tokenizer)
    resumed.set_state(state)
    assert all(same(next(resumed), batch) for batch in later)


def test_a_state_of_another_mixture_is_refused(data, tokenizer):
    state = build(data, tokenizer).get_state()
    for change, field in (
        ({"sequence_length": 500}, "sequence_length was 400 in the checkpoint and is 500"),
        ({"domains": data.domains[:2]}, "domains was"),
        ({"prompt": "llava_mole"}, "prompt was v1"),
    ):
        with pytest.raises(UserError, match=f"data state: {field}"):
            build(dataclasses.replace(data, **change), tokenizer).set_state(state)
    with pytest.raises(UserError, match="seed was 0"):
        build(data, tokenizer, seed=1).set_state(state)
    with pytest.raises(UserError, match="shards was 2 in the checkpoint and is 1"):
        build(dataclasses.replace(data, shards=1), tokenizer).set_state(state)
    with pytest.raises(UserError, match="version 0 is not"):
        build(data, tokenizer).set_state({**state, "version": 0})


def test_a_state_of_an_earlier_version_is_known(data, tokenizer):
    state = build(data, tokenizer).get_state()
    earlier = {"images_per_row" if name == "tiles_per_row" else name: value for name, value in state["mixture"].items()}
    del earlier["tiling"]
    build(data, tokenizer).set_state({**state, "mixture": earlier})
    with pytest.raises(UserError, match="tiles_per_row was 9 in the checkpoint"):
        build(data, tokenizer).set_state({**state, "mixture": {**earlier, "images_per_row": 9}})


def _rewritten(folder: pathlib.Path) -> None:
    path = folder / "photos.json"
    path.write_text(path.read_text().replace("It is 1.", "It is 9."))


def _swapped(folder: pathlib.Path) -> None:
    path = folder / "text.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))


def _repainted(folder: pathlib.Path) -> None:
    Image.effect_noise((30, 30), 9).save(folder / "photos0.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rewritten, "the records of domain photos have changed since the checkpoint"),
        (_swapped, "the records of domain text have changed"),
        (_repainted, "the images of domain photos have changed"),
    ],
)
def test_a_state_is_not_continued_on_other_data(tokenizer, tmp_path, change, message):
    domains = (domain(tmp_path, "photos", 3), domain(tmp_path, "text", 3, image=False))
    data = DataConfig(domains=domains, sequence_length=400)
    mixture = build(data, tokenizer)
    next(mixture)
    state = json.loads(json.dumps(mixture.get_state()))
    assert build(data, tokenizer).set_state(state) is None
    change(tmp_path)
    with pytest.raises(UserError, match=rf"data state: {message} .*; put them back, or start a new run"):
        build(data, tokenizer).set_state(state)


def test_a_state_of_before_contents_were_written_down_is_continued_with_a_word(data, tokenizer):
    mixture = build(data, tokenizer)
    next(mixture)
    state = json.loads(json.dumps(mixture.get_state()))
    del state["mixture"]["content"]
    resumed = build(data, tokenizer)
    assert "whether they changed is not known" in (resumed.set_state(state) or "")
    assert same(next(resumed), next(mixture))


def test_the_drawn_ratio_and_the_report(data, tokenizer):
    data = dataclasses.replace(data, packing_bins=1)
    mixture = build(data, tokenizer, rows=1)
    counts = collections.Counter()
    batches = []
    for _ in range(40):
        batches.append(next(mixture))
        counts.update(name.split("/")[0] for name in batches[-1].record_ids[0])
    report = mixture.report(mixture.get_state())
    total = sum(counts.values())
    for i, (name, share) in enumerate((("photos", 2 / 4), ("charts", 1 / 4), ("text", 1 / 4))):
        one = report["domains"][name]
        # With one open row everything drawn is given out, in order.
        assert abs(counts[name] - total * share) < 3
        assert one["examples"] == counts[name]
        assert one["share_expected"] == share
        assert one["share_of_examples"] == pytest.approx(counts[name] / total)
        tokens = sum(((b.segment_ids > 0) & (b.domain_ids == i)).sum() for b in batches)
        assert one["tokens"] == tokens
        assert one["supervised_tokens"] == sum((b.loss_mask * (b.domain_ids == i)).sum() for b in batches)
        of_all = [d["supervised_tokens"] for d in report["domains"].values()]
        assert one["share_of_loss"] == pytest.approx(one["supervised_tokens"] / sum(of_all))
        by_example = mixture.report(mixture.get_state(), "example")["domains"][name]
        assert by_example["share_of_loss"] == one["share_of_examples"] != one["share_of_loss"]
        assert one["share_of_tokens"] == pytest.approx(tokens / sum(d["tokens"] for d in report["domains"].values()))
    assert report["rows"] == 40
    assert report["fill_rate"] == pytest.approx(np.mean([(b.segment_ids > 0).mean() for b in batches]))
    assert [report["domains"][name]["records"] for name in ("photos", "charts", "text")] == [9, 5, 4]


def test_what_parts_skip_is_counted_once(faulty, tokenizer):
    mixtures = [build(faulty, tokenizer, rows=2, part=part, parts=2) for part in range(2)]
    for _ in range(30):
        for mixture in mixtures:
            next(mixture)
    state = merged([mixture.get_state() for mixture in mixtures])
    assert mixtures[0].report(state)["domains"]["d"]["skipped"] == dict.fromkeys(FAULTS, 1)


def test_a_batch_of_text_only(tmp_path, tokenizer):
    data = DataConfig(domains=(domain(tmp_path, "text", 3, image=False),), sequence_length=300, packing_bins=2)
    batch = next(build(data, tokenizer))
    assert batch.images.shape == (2, 4, 8, 8, 3)
    assert not batch.images.any()
    check_batch(batch, data, tokenizer)


def test_several_images_of_a_record_share_its_row(tmp_path, tokenizer):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    names = [write_image(tmp_path, f"{i}.png", colour) for i, colour in enumerate(colours)]
    records = [record("two", image=names[:2]), record("one", image=names[2]), record("same", image=[names[2]] * 2)]
    data = DataConfig(
        domains=(DomainConfig("d", write(tmp_path, "d", records)),),
        sequence_length=500,
        tiles_per_row=3,
        packing_bins=2,
    )
    mixture = build(data, tokenizer)
    for _ in range(4):
        batch = next(mixture)
        check_batch(batch, data, tokenizer)
        assert ((batch.tokens == IMAGE.token_id).sum(1) <= 3 * 3).all()


@pytest.fixture
def faulty(tmp_path) -> DataConfig:
    """A domain with one record of each fault among five good ones."""
    image = write_image(tmp_path, "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    good = [record(f"good{i}", image=image) for i in range(5)]
    empty = record("empty")
    empty["conversations"][1]["value"] = ""
    bad = [
        empty,
        record("broken", image="broken.png"),
        record("long", answer="x" * 2000),
        record("many", image=[image] * 3),
    ]
    path = write(tmp_path, "d", [*good, *bad])
    return DataConfig(
        domains=(DomainConfig("d", path),),
        sequence_length=300,
        tiles_per_row=2,
        packing_bins=2,
        on_bad_record="skip",
        on_too_long="skip",
    )


FAULTS = {
    "bad record": r"^d/5: .*d\.json: record 5 \(id 'empty'\), field conversations\[1\]\.value: the text is empty",
    "bad image": r"^d/broken: .*d\.json: record 6 \(id 'broken'\), field image: image 'broken\.png' ",
    "too long": r"^d/long: .*d\.json: record 7 \(id 'long'\): \d+ tokens, over data\.sequence_length 300",
    "too many images": r"^d/many: .*d\.json: record 8 \(id 'many'\), field image: 3 images, over data\.tiles_per_row",
}


def test_skipped_records_are_counted_once_and_survive_a_resume(faulty, tokenizer):
    mixture = build(faulty, tokenizer, rows=1)
    states, batches = [], []
    for _ in range(30):
        batches.append(next(mixture))
        states.append(json.loads(json.dumps(mixture.get_state())))
    assert mixture.report(states[-1])["domains"]["d"]["examples"] > 3 * 5, "several passes"
    assert mixture.skipped.keys() == FAULTS.keys()
    for reason, pattern in FAULTS.items():
        (text,) = mixture.skipped[reason]
        assert re.search(pattern, text), text
    assert mixture.report(states[-1])["domains"]["d"]["skipped"] == dict.fromkeys(FAULTS, 1)
    assert {name for batch in batches for name in batch.record_ids[0]} == {f"d/good{i}" for i in range(5)}
    for place in (0, 10, 28):
        resumed = build(faulty, tokenizer, rows=1)
        resumed.set_state(states[place])
        assert all(same(next(resumed), batch) for batch in batches[place + 1 :])
        assert resumed.skipped == mixture.skipped


@pytest.mark.parametrize(
    ("fault", "field", "workers"),
    [
        ("bad image", "on_bad_record", 0),
        ("bad image", "on_bad_record", 1),
        ("too long", "on_too_long", 0),
        ("too many images", "on_too_long", 0),
    ],
)
def test_a_fault_stops_with_its_one_line(faulty, tokenizer, fault, field, workers):
    keep = {"bad image": 6, "too long": 7, "too many images": 8}[fault]
    path = pathlib.Path(faulty.domains[0].path)
    records = json.loads(path.read_text())
    path.write_text(json.dumps([*records[:2], records[keep]]))
    data = dataclasses.replace(faulty, workers=workers, **{field: "error"})
    pattern = FAULTS[fault].partition(": ")[2].replace(f"record {keep}", "record 2")
    mixture = build(data, tokenizer)
    with pytest.raises(UserError, match=pattern) as caught:
        list(itertools.islice(mixture, 10))
    assert str(caught.value).endswith(f"(or set data.{field} to skip)")
    assert "\n" not in str(caught.value)
    mixture.close()
    with pytest.raises(UserError, match=pattern):
        build(dataclasses.replace(data, workers=0), tokenizer, epochs=1).count_batches()


def test_a_domain_of_which_nothing_is_left_stops(tmp_path, tokenizer):
    path = write(tmp_path, "d", [record(str(i), image="none.png") for i in range(3)])
    data = DataConfig(domains=(DomainConfig("d", path),), sequence_length=300, on_bad_record="skip")
    with pytest.raises(UserError, match=r"domain d: all 3 records were skipped; the last one: .*'none\.png' does not"):
        next(build(data, tokenizer))


def test_a_row_that_cannot_hold_an_image_is_refused(data, tokenizer):
    with pytest.raises(UserError, match=r"data\.sequence_length 3 has no place for an image of 3 positions"):
        build(dataclasses.replace(data, sequence_length=3), tokenizer)


def test_cap_and_repeat_reach_the_epoch(data, tokenizer):
    capped = dataclasses.replace(data.domains[0], cap=4, repeat=1.5)
    mixture = build(dataclasses.replace(data, domains=(capped, data.domains[1])), tokenizer, rows=1)
    assert mixture.examples_per_epoch == 6 + 5
    names = {name for _ in range(30) for name in next(mixture).record_ids[0] if name.startswith("photos/")}
    assert len(names) == 4
