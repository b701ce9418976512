"""What an adapter kind provides. A new kind is one file that defines a `Kind`, and its line in `build.KINDS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

from jaxtyping import Array, Float

from mole_jax.adapters.router import Routing
from mole_jax.config import AdapterConfig
from mole_jax.parameters import Declare


class Projection(NamedTuple):
    """A matrix of the decoder that may carry an adapter."""

    name: str
    """Such as ``q_proj``; `AdapterConfig.targets` lists these names."""
    d_in: int
    d_out: int
    axes: tuple[str, str]
    """Names of the input and output axis (`mole_jax.parallel.sharding.RULES`)."""


class Adapter(Protocol):
    """The module beside one projection."""

    def __call__(
        self, x: Float[Array, "B S I"], routing: Routing | None, width: int | None = None
    ) -> Float[Array, "B S O"] | Float[Array, "B H S C"]:
        """Returns what is added to the projection's output.

        Args:
            x: the projection's input after dropout.
            routing: None in attention and without routers.
            width: the output is cut into heads of this width (q, k and v; `mole_jax.adapters.products.by_head`).
        """
        ...


@dataclasses.dataclass(frozen=True)
class Kind:
    """One value of `AdapterConfig.kind`."""

    make: Callable[[AdapterConfig, Declare, Projection], Adapter | None]
    """Makes the adapter of one targeted projection; None leaves it as it is."""
    routed: bool = False
    """Whether MLPs have routers, and their adapters receive a `Routing`."""
