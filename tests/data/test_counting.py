"""An epoch is counted by several processes as by one."""

from __future__ import annotations

import pytest

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data import counting
from mole_jax.errors import UserError
from tests.data.domains_on_disk import build, record, write


@pytest.fixture
def several(monkeypatch):
    """Processes for few examples too."""
    monkeypatch.setattr(counting, "FEW", 0)
    monkeypatch.setattr(counting, "_cores", lambda: 2)


def _domain(folder, name: str, lengths: list[int]) -> DomainConfig:
    return DomainConfig(name, write(folder, name, [record(str(i), answer="x" * n) for i, n in enumerate(lengths)]))


def _data(*domains: DomainConfig, **settings) -> DataConfig:
    return DataConfig(domains=domains, mix="size", sequence_length=300, shards=4, packing_bins=8, **settings)


def test_processes_are_as_many_as_cores_shards_and_work_allow(monkeypatch):
    monkeypatch.setattr(counting, "_cores", lambda: 8)
    assert counting.processes(16, counting.FEW) == 1
    assert counting.processes(16, counting.FEW + 1) == 8
    assert counting.processes(3, 10**6) == 3


def test_several_processes_count_what_one_does(tmp_path, tokenizer, several, monkeypatch):
    """Also where they leave records out, of which none but all together would be a fault."""
    data = _data(_domain(tmp_path, "a", [1 + 3 * i % 50 for i in range(40)]), _domain(tmp_path, "b", [500] * 7 + [5]))
    mixture = build(data, tokenizer, rows=8, epochs=2.5)
    found = mixture.count_batches()
    monkeypatch.setattr(counting, "FEW", 10**9)
    assert found == mixture.count_batches() > 4


@pytest.mark.slow
def test_a_fault_in_another_process_is_its_one_line_here(tmp_path, tokenizer, several):
    data = _data(_domain(tmp_path, "a", [5] * 20), _domain(tmp_path, "b", [5] * 6 + [500]), on_too_long="error")
    with pytest.raises(UserError, match=r"b\.json: record 6 .*over data.sequence_length .*or set data\.on_too_long"):
        build(data, tokenizer, rows=8, epochs=1).count_batches()


@pytest.mark.slow
def test_a_domain_of_which_each_process_skips_a_part_has_nothing_left(tmp_path, tokenizer, several):
    data = _data(_domain(tmp_path, "a", [5] * 20), _domain(tmp_path, "b", [500] * 7))
    with pytest.raises(UserError, match=r"domain b: all 7 records were skipped; the last one: b/6: .*tokens"):
        build(data, tokenizer, rows=8, epochs=1).count_batches()
