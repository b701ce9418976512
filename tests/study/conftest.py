"""What the tests of the study share."""

from __future__ import annotations

import pytest

from tests.study import small


@pytest.fixture(scope="session")
def materials(tmp_path_factory):
    """Data and base of `small.study`, not to be changed."""
    return small.write(tmp_path_factory.mktemp("study"))
