"""Each golden is opened, and its programs compiled, once."""

from __future__ import annotations

import functools

import pytest

from mole_jax.config import AdapterConfig
from tests.families.golden import NAMES, Golden, forward


class Plain:
    """A golden's model without adapters, on one device."""

    def __init__(self, name: str):
        self.golden = Golden(name)
        self.spec = self.golden.spec(AdapterConfig(kind="none"))
        _, self.leaves = self.golden.place(self.spec)
        self.forward = forward(self.spec.graph)


@functools.cache
def plain_of(name: str) -> Plain:
    return Plain(name)


@pytest.fixture(params=NAMES)
def plain(request) -> Plain:
    return plain_of(request.param)
