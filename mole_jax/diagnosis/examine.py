"""All checks, on all processes, one after the other."""

from __future__ import annotations

import dataclasses
import itertools

import jax

from mole_jax.config import MeshConfig
from mole_jax.diagnosis import kernels, machine, speed
from mole_jax.diagnosis.finding import Finding
from mole_jax.files import absolute
from mole_jax.parallel import hosts
from mole_jax.parallel.mesh import make_mesh

PICTURE_SECONDS = 1.0


def examine(mesh_config: MeshConfig, workdir: str | None) -> list[Finding] | None:
    """Returns what was found by all processes on process 0, None on the others.

    Args:
        mesh_config: whose axes are measured.
        workdir: where a checkpoint is tried. None: nowhere.

    Raises:
        UserError: the mesh does not fit the devices.
    """
    mesh = make_mesh(mesh_config)
    findings = [
        *machine.versions(),
        *machine.devices(),
        *kernels.attention_paths(),
        *kernels.expert_paths(),
        *speed.bandwidths(mesh),
        *([speed.storage(absolute(workdir), mesh)] if workdir else ()),
        speed.pictures(PICTURE_SECONDS),
    ]
    found = hosts.gathered("doctor", [dataclasses.asdict(one) for one in findings])
    if found is None:
        return None
    several = jax.process_count() > 1
    named = ([Finding(**one) for one in rows] for rows in found)
    return list(
        itertools.chain.from_iterable(
            [dataclasses.replace(one, check=f"{one.check} (process {number})") for one in rows] if several else rows
            for number, rows in enumerate(named)
        )
    )
