"""The desk: processes find what one finds, copies and leaks are told, and what is converted gives the same batches."""

from __future__ import annotations

import dataclasses
import html

import pytest
from PIL import Image

from mole_jax.config import DataConfig, DomainConfig, TaskConfig
from mole_jax.data.desk import check, convert, pack, page, show
from mole_jax.data.desk.opened import open_loader
from mole_jax.data.load import RecordSource
from mole_jax.errors import UserError
from tests.data.domains_on_disk import IMAGE, build, domain, record, same, write, write_image


@pytest.fixture
def data(tmp_path) -> DataConfig:
    several = record(
        "two", "What?", "Two dogs.", [write_image(tmp_path, "a.png"), write_image(tmp_path, "b.png", (9, 9, 9))]
    )
    text = DomainConfig("text", write(tmp_path, "text", [record("x", "Why?", "So."), several]), weight=2.0)
    return DataConfig(domains=(domain(tmp_path, "photos", 5), text), sequence_length=300, packing_bins=2)


def test_several_processes_find_what_one_finds(data, tokenizer):
    loader = open_loader(data, tokenizer, IMAGE)
    alone = check.inspect(data, loader)
    assert check.inspect(data, loader, workers=2).as_json() == alone.as_json()


def test_copies_and_leaks_are_told(tmp_path, tokenizer):
    first, second = (write_image(tmp_path, f"{name}.png") for name in "ab")  # the same pixels under two names
    other = write_image(tmp_path, "c.png", (200, 0, 0))
    one = [record("1", "What? ", "A dog.", first), record("2", "What?", "A dog.", second), record("3", image=other)]
    domains = tuple(
        DomainConfig(name, write(tmp_path, name, records)) for name, records in (("d", one), ("e", one[:1]))
    )
    task = TaskConfig("held", write(tmp_path, "held", [record("h", image=other), record("new", "Who?")]))
    data = DataConfig(domains=domains, sequence_length=300)
    loader = open_loader(data, tokenizer, IMAGE)
    loader = dataclasses.replace(loader, sources=(*loader.sources, RecordSource.open(task)))
    found = check.inspect(data, loader)
    assert [one.records for one in found.duplicates.within] == [(("d/1", "d/2"),)]
    assert [one.records for one in found.duplicates.across] == [(("d/1", "e/1"),)]
    (leak,) = (line for line, notable in found.lines() if notable)
    assert leak.startswith("leak: 1 records of d are in the held-out task held (d/3 = held/h)")


def test_shares_of_the_loss_are_those_of_an_epoch_drawn(data, tokenizer):
    found = check.inspect(data, open_loader(data, tokenizer, IMAGE)).as_json()["domains"]
    mixture = build(data, tokenizer, rows=1, epochs=1.0)
    for _ in range(mixture.count_batches()):
        next(mixture)
    for average in ("token", "example"):
        drawn = mixture.report(mixture.get_state(), average)["domains"]
        for name in ("photos", "text"):
            assert found[name]["drawn"] == drawn[name]["examples"]
            assert found[name]["share_of_loss"][average] == pytest.approx(drawn[name]["share_of_loss"])


def test_a_converted_mixture_gives_the_same_batches(data, tokenizer, tmp_path):
    output = str(tmp_path / "out")
    left_out = convert.convert(data, open_loader(data, tokenizer, IMAGE), output, shards=2)
    assert [one.reasons for one in left_out] == [{}, {}]
    lines = "\n".join(convert.config_lines(data, output))
    domains = eval(lines.removeprefix("domains=").rstrip(","), {"DomainConfig": DomainConfig})
    assert [(one.name, one.weight) for one in domains] == [("photos", 1.0), ("text", 2.0)]
    original, converted = build(data, tokenizer), build(dataclasses.replace(data, domains=domains), tokenizer)
    assert all(same(next(original), next(converted)) for _ in range(6))
    with pytest.raises(UserError, match="is there already and not empty"):
        convert.convert(data, open_loader(data, tokenizer, IMAGE), output, shards=2)


def test_what_is_converted_keeps_which_answers_are_trained_on(tmp_path, tokenizer):
    ask, say = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    path = write(tmp_path, "d", [{"id": "a", "messages": [ask, {**say, "loss": False}, ask, say]}])
    data = DataConfig(domains=(DomainConfig("d", path),))
    convert.convert(data, open_loader(data, tokenizer, IMAGE), str(tmp_path / "out"), shards=1)
    there = dataclasses.replace(data, domains=(DomainConfig("d", str(tmp_path / "out" / "d")),))
    (before, after) = (open_loader(one, tokenizer, IMAGE).load(0, 0) for one in (data, there))
    assert before.supervised.tolist() == after.supervised.tolist()
    assert after.supervised.sum() == len(tokenizer.encode("So.")[0]) + 1


def test_sizes_of_images_are_told_as_bars_where_they_differ(tmp_path, tokenizer):
    for name, size in (("a", (64, 32)), ("b", (10, 16)), ("c", (64, 64))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    data = DataConfig(domains=(DomainConfig("d", write(tmp_path, "d", [record(x, image=f"{x}.png") for x in "abc"])),))
    found = check.inspect(data, open_loader(data, tokenizer, IMAGE))
    lines = [text for text, _ in found.lines()]
    bars = lines[lines.index("longer side of an image") + 1 :][:8]
    assert [int(line.replace(" to ", " ").split()[2]) for line in bars] == [0, 1, 0, 0, 0, 0, 0, 2]
    assert found.as_json()["domains"]["d"]["longer_sides"] == {16: 1, 64: 2}


def test_what_has_no_picture_is_not_converted(tmp_path, tokenizer):
    records = [record("a"), record("b", image="none.png")]
    data = DataConfig(domains=(DomainConfig("d", write(tmp_path, "d", records)),), sequence_length=300)
    loader = open_loader(data, tokenizer, IMAGE)
    with pytest.raises(UserError, match=r"d\.json: record 1, field image: image 'none\.png' does not exist"):
        convert.convert(data, loader, str(tmp_path / "out"), shards=1)
    lenient = dataclasses.replace(data, on_bad_record="skip")
    (left_out,) = convert.convert(lenient, loader, str(tmp_path / "out"), shards=1)
    assert left_out.reasons == {"bad image": 1}


def test_a_page_marks_answers_and_what_is_over_and_lets_nothing_act(tmp_path, tokenizer):
    hostile = "<script>alert(1)</script>\u202e"
    records = [record(hostile, hostile, "A dog.", write_image(tmp_path, "a.png")), record("long", answer="x" * 900)]
    data = DataConfig(domains=(DomainConfig("d", write(tmp_path, "d", records)),), sequence_length=300)
    loader = open_loader(data, tokenizer, IMAGE)
    good, long = (show.look_closely(loader, 0, i) for i in range(2))
    made = page.write_page("n", [good, long], loader)
    assert "<script" not in made
    assert "\u202e" not in made
    assert html.escape("<script>alert(1)</script>") in made
    assert made.count("data:image/jpeg;base64,") == 1
    assert "A dog.</s>".replace("<", "&lt;").replace(">", "&gt;") in made
    assert "too long: " in made
    assert '<span class="over">xx' in made


def test_packing_by_hand(data):
    """Rows of 300 take three examples of 100, or two where only two may be in a row."""
    settings = dataclasses.replace(data, packing_bins=1, tiles_per_row=0)
    three = pack.pack(settings, [(100, 0)], shards=1)
    two = pack.pack(dataclasses.replace(settings, examples_per_row=2), [(100, 0)], shards=1)
    short = pack.pack(dataclasses.replace(settings, sequence_length=99), [(100, 0)], shards=1)
    assert [(one.fill, one.examples, one.left_out, one.tiles) for one in (three, two)] == [
        (1.0, 3.0, 0.0, None),
        (pytest.approx(2 / 3), 2.0, 0.0, None),
    ]
    assert short.left_out == 1.0
    assert pack.best([two, three, short]) is three
    assert pack.verdict([two, three, short]) == "best: data.examples_per_row 16, with which 100.0% is filled, not 66.7%"
