"""ms-swift's `query` and `response`, with `history`, `system` and `images`.

Source: ms-swift's Custom-dataset (query-response). Images without ``<image>`` in the text stand first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.data.layouts.fields import history, images_of, said, system
from mole_jax.data.layouts.layout import Fail, Layout, Parts


def fits(record: Mapping[str, Any]) -> bool:
    """Returns whether `record` has a query and a response."""
    return "query" in record and "response" in record


def read(record: Mapping[str, Any], fail: Fail) -> Parts:
    """Returns turns and images; raises `UserError` for a field that is missing or of another type."""
    last = (said("user", record, "query", fail), said("assistant", record, "response", fail))
    return Parts(system(record, fail) + history(record, fail) + last, *images_of(record, fail), first=True)


LAYOUT = Layout("query_response", ("query", "response"), fits, read)
