"""What is left out is told with numbers, before the training and after it, and too much of it stops."""

from __future__ import annotations

import dataclasses

import pytest

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data.desk import check as inspection
from mole_jax.data.desk.opened import open_loader
from mole_jax.data.left_out import LeftOut, check, evenly, lines, of_report, of_task
from mole_jax.errors import UserError
from tests.data.domains_on_disk import IMAGE, build, record, write

NINE = LeftOut("d", 10, 10, {"too long": 7, "bad image": 2})


def test_it_is_told_by_domain_and_reason():
    none, few = LeftOut("a", 2000, 2000, {}), LeftOut("b", 665_298, 1000, {"too long": 50})
    assert str(NINE) == "d: 9 of 10 records are left out (90.0%): 7 too long, 2 bad image"
    assert str(few) == "b: 50 of 1,000 records read, out of 665,298, are left out (5.0%): 50 too long"
    assert str(none) == "a: none of 2,000 records is left out"
    assert [one.notable for one in (NINE, none, few)] == [True, False, False]
    assert lines([none, none], begin="read") == [("read: no record is left out, of 4,000 read", False)]
    assert lines([none, NINE], begin="read") == [(f"read: {none}", False), (f"read: {NINE}", True)]


def test_too_much_is_one_line_with_the_setting():
    check([NINE], None)
    check([NINE], 0.9)
    with pytest.raises(
        UserError, match=r"^domain d: 9 of 10 records are left out .*; that is over data\.most_skipped 0\.5"
    ):
        check([LeftOut("a", 3, 3, {}), NINE], 0.5)


def test_a_share_of_few_records_says_nothing_yet():
    check([LeftOut("d", 10_000, 20, {"too long": 20})], 0.1)
    with pytest.raises(UserError, match="most_skipped"):
        check([LeftOut("d", 10_000, 100, {"too long": 20})], 0.1)


@pytest.mark.parametrize("total", [0, 1, 7, 100, 101, 2345])
def test_records_looked_at_are_spread_over_all(total):
    chosen = list(evenly(total, 100))
    assert len(set(chosen)) == len(chosen) == min(total, 100)
    assert all(0 <= one < total for one in chosen)
    assert not chosen or chosen[-1] >= total - 1 - total // 100


@pytest.fixture
def data(tmp_path) -> DataConfig:
    few = [record("a"), record("b", answer="x" * 2000), record("c", image="none.png"), record("d"), {"id": "e"}]
    many = [record(str(i), answer="x" * (2000 if i % 4 == 0 else 3)) for i in range(400)]
    domains = (
        DomainConfig("few", write(tmp_path, "few", few)),
        DomainConfig("many", write(tmp_path, "many", many), cap=300),
        DomainConfig("unused", write(tmp_path, "unused", few), weight=0.0),
    )
    return DataConfig(domains=domains, sequence_length=300, on_bad_record="skip")


def test_a_survey_counts_small_domains_exactly_and_samples_large_ones(data, tokenizer, monkeypatch):
    monkeypatch.setattr("mole_jax.data.mixture.SURVEYED", 300)
    few, many = build(data, tokenizer).survey()
    assert few == LeftOut("few", 5, 5, {"too long": 1, "bad image": 1, "bad record": 1})
    assert (many.records, many.read) == (300, 100)
    assert 10 <= many.reasons["too long"] <= 40


def test_a_survey_does_not_count_what_stops_the_training(data, tokenizer):
    few, _ = build(dataclasses.replace(data, on_bad_record="error"), tokenizer).survey()
    assert few.reasons == {"too long": 1}


def test_a_report_says_how_many_were_read(data, tokenizer):
    mixture = build(data, tokenizer, rows=1)
    seen = []
    for _ in range(200):
        next(mixture)
        few, many = of_report(mixture.report(mixture.get_state()))
        assert sum(few.reasons.values()) <= few.read <= 5
        assert sum(many.reasons.values()) <= many.read <= 300
        seen.append(many.read)
    assert seen == sorted(seen)
    assert few == LeftOut("few", 5, 5, {"bad record": 1, "bad image": 1, "too long": 1})
    assert 0.15 < many.share < 0.35
    assert of_report(None) == of_report({"domains": {"d": {"records": 3, "skipped": {}}}}) == []


def test_an_evaluated_task_says_it_too():
    assert of_task("t", {"examples": 1, "skipped": {"too long": 9}}) == LeftOut("t", 10, 10, {"too long": 9})
    assert of_task("t", {"examples": 4}).reasons == {}


def test_an_inspection_says_it_too(data, tokenizer):
    found = inspection.inspect(data, open_loader(data, tokenizer, image=IMAGE))
    few, many, _ = found.domains
    assert few.left_out == LeftOut("few", 5, 5, {"too long": 1, "bad image": 1, "bad record": 1})
    assert (few.stopping, many.stopping) == (0, 0)
    told = dict(found.lines())
    assert told["few: 3 of 5 records are left out (60.0%): 1 too long, 1 bad image, 1 bad record"]
    assert told["many: 100 of 400 records are left out (25.0%): 100 too long"]
    # By equal weights 153 draws of few, three fifths of them lost, and 152 of many, about a quarter of them lost.
    assert 110 < found.skipped_per_epoch < 150
    assert f"one epoch: 305 examples, {found.skipped_per_epoch} of them of records that are left out" in told
    assert not found.stops

    strict = dataclasses.replace(data, on_bad_record="error")
    found = inspection.inspect(strict, open_loader(strict, tokenizer, image=IMAGE))
    assert found.domains[0].left_out.reasons == {"too long": 1}
    assert "few: training stops at 2 of 5 records" in str(found)
    assert found.stops
