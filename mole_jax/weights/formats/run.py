"""A run's folder: the newest checkpoint, or one named as ``FOLDER/checkpoints/STEP``, over the base that it names."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

import jax
from etils import epath

from mole_jax.config import AdapterConfig
from mole_jax.config_json import identity
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.weights import run
from mole_jax.weights.checksums import Checksums
from mole_jax.weights.format import Export, Format, Given
from mole_jax.weights.leaf import Leaf
from mole_jax.weights.source import Abstract
from mole_jax.weights.sources import LayeredSource, tokenizer_in


class RunArrays:
    """The arrays of a checkpoint; each process reads what its devices hold."""

    def __init__(self, folder: epath.Path, step: int, written: Checksums):
        self.folder, self.step, self._written = folder, step, written

    @functools.cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return run.stored_shapes(self.folder, self.step)

    @property
    def paths(self) -> Collection[str]:
        return self._shapes.keys()

    def stored(self) -> Mapping[str, Leaf]:
        return run.stored_leaves(self.folder, self.step, self._written)

    def load(self, abstract: Abstract) -> dict[str, jax.Array]:
        return run.read_params(self.folder, self.step, abstract, self._written)


def _is_checkpoint(path: epath.Path) -> bool:
    return path.parent.name == run.CHECKPOINTS and path.name.isdigit() and path.exists()


def _recognise(given: Given) -> bool:
    return _is_checkpoint(given.path) or (given.path / run.CHECKPOINTS).exists()


def _read(given: Given) -> LayeredSource:
    folder, step = given.path, run.latest_step(given.path)
    if _is_checkpoint(given.path):
        folder, step = given.path.parent.parent, int(given.path.name)
    if step is None:
        raise UserError(f"{given.name}: a run's folder without a finished checkpoint; train longer or choose another")
    meta = run.read_meta(folder, step)
    base_name = _base_name(folder, meta)
    return LayeredSource(
        name=str(folder),
        architecture=meta.architecture,
        adapter=meta.adapter,
        trained=meta.trained,
        seed=meta.seed,
        prompt=meta.prompt,
        image_aspect=meta.image_aspect,
        tokenizer=tokenizer_in(folder),
        own=RunArrays(folder, step, meta.checksums),
        identity=f"{identity(meta.architecture)} {identity(meta.adapter)}",
        base_name=base_name,
        open_base=lambda: given.open(str(base_name)),
        recorded_hash=meta.base_hash,
        step=step,
        quantised=meta.quantised,
    )


def _base_name(folder: epath.Path, meta: run.Meta) -> str | None:
    if meta.base is None:
        return None
    # A base inside the run's own folder is named relative to it.
    inside = folder / meta.base
    return str(inside) if inside.exists() else meta.base


def _own_paths(export: Export) -> Collection[str] | None:
    """Returns the arrays of adapters from a file, which become a run over their base; None for all other weights."""
    source = export.source
    return source.own.paths if isinstance(source, LayeredSource) and source.step is None else None


def _wants(export: Export, path: str, group: str) -> bool:
    own = _own_paths(export)
    return own is None or path in own


def _check(export: Export) -> None:
    if export.source.step is not None and export.adapter.kind != "none":
        raise UserError(f"{export.where}: is a run with {export.adapter.kind} adapters already; convert it --to hf")


def _write(export: Export, folder: str) -> None:
    own = _own_paths(export) is not None
    adapter = export.adapter if own else AdapterConfig(kind="none")
    meta = export.meta(adapter, export.source.trained if own else ())
    run.write_params(absolute(folder), export.leaves, meta)
    export.save_tokenizer(str(absolute(folder)))


FORMAT = Format(
    name="run",
    reads="a run's folder",
    recognise=_recognise,
    read=_read,
    writes="a run's folder: a base for train, or adapters with the name of their base",
    every_setting=True,
    wants=_wants,
    check=_check,
    write=_write,
)
