"""Which of two equal computations is faster on the device in force (measured: docs/pods.md, `python -m benchmarks`)."""

from __future__ import annotations

import numpy as np

from mole_jax.parallel.devices import kind_in_force

GROUPED_FROM = {"TPU": 1024}
"""Stacked ranks E * R from which sorting is known to pay, by the first word of `device_kind`.

Other devices never sort: on a CPU `ragged_dot` does all the work of the masked form and more.
"""

FEW_TOKENS = 1024
"""With this many tokens or fewer (decoding), a sort costs more than it saves."""


def sorting_pays(ranks: int, tokens: int) -> bool:
    """Returns whether sorting tokens by expert is faster than masking; `ranks` is E * R."""
    return tokens > FEW_TOKENS and ranks >= GROUPED_FROM.get(kind_in_force(), np.inf)


def one_token_axis_pays() -> bool:
    """Returns whether low-rank products are faster with rows and tokens as one axis.

    A CPU computes gradients that sum over one axis in half the time. A TPU's compiler chooses its own layout of two
    axes; with one axis a whole step at 1,024 stacked ranks takes 5 % longer.
    """
    return kind_in_force() == "cpu"
