"""What every container of records gives: they by index, in order, and a hash of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mole_jax.errors import UserError


class Records(Protocol):
    """The raw records of a domain; can be pickled for worker processes, and then holds no record in memory.

    Attributes:
      file: name of it, for messages.
      sha256: hash of its content.
    """

    file: str
    sha256: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """Returns record `index`, most often a mapping; images in it are paths or encoded bytes.

        Raises:
          UserError: it cannot be read; the message names file, record and what to do.
        """
        ...

    def values(self) -> Iterator[Any]:
        """Yields all records in order, faster than by index; None for one that cannot be read."""
        ...

    def without_pictures(self) -> Iterator[Any]:
        """Yields all records in order for what is not in their pictures, such as names of files.

        Embedded pictures may be left out, where that saves reading them; so may records that can have no other.
        """
        ...


def in_order(records: Sequence[Any]) -> Iterator[Any]:
    """Yields all records by index, for a container that knows no faster way; None for one that cannot be read."""
    for index in range(len(records)):
        try:
            yield records[index]
        except UserError:
            yield None
