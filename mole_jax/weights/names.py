"""The names of a model's parameters, ours and those of its family's files."""

from __future__ import annotations

from mole_jax.families import family_of
from mole_jax.families.shared import names
from mole_jax.families.shared.names import LeafSpec
from mole_jax.model.architecture import LlavaArchitecture


def leaf_specs(arch: LlavaArchitecture) -> dict[str, LeafSpec]:
    """Returns every leaf of `arch` that has a foreign name, by path, in the order in which files are written.

    Image start and end vectors have none; a tied head has no leaf.
    """
    return names.leaf_specs(family_of(arch).rows(arch), arch)
