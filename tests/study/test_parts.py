"""Which arms a process runs: the flag, a pod's variables, or all."""

from __future__ import annotations

import pytest

from mole_jax.errors import UserError
from mole_jax.study.parts import part_of


def test_the_flag_counts_from_zero_and_leaves_the_environment():
    pod = {"MEGASCALE_SLICE_ID": "1", "MEGASCALE_NUM_SLICES": "2"}
    assert part_of("3/4", pod) == (3, 4)
    assert len(pod) == 2


def test_a_slice_of_a_pod_is_a_part_and_a_job_of_its_own():
    pod = {"MEGASCALE_SLICE_ID": "1", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_PORT": "8080", "HOME": "here"}
    assert part_of(None, pod) == (1, 2)
    assert pod == {"HOME": "here"}


def test_one_machine_runs_everything():
    assert part_of(None, {}) == (0, 1)


@pytest.mark.parametrize("flag", ["4/4", "1", "1/", "/2", "a/2", "-1/2", "1/2/3"])
def test_a_part_that_is_none_is_refused(flag):
    with pytest.raises(UserError, match=f"--part {flag}: give two numbers"):
        part_of(flag, {})
