"""A run's checkpoint on disk: which arrays it holds and what it says about itself.

``checkpoints/<step>/params`` holds the arrays by path (orbax), ``meta`` the facts that give them
meaning. The trainer adds ``optimizer`` and ``data`` (`mole_jax.training.checkpoint`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import quote

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from mole_jax import config_json
from mole_jax.compat import array_writer
from mole_jax.config import AdapterConfig, ImageAspect, PromptName, Quantisation
from mole_jax.errors import UserError
from mole_jax.files import explained, is_remote, made
from mole_jax.model.architecture import LlavaArchitecture, check_sizes
from mole_jax.parameters import flatten, unflatten
from mole_jax.weights.checksums import Checksums, changed, checksum
from mole_jax.weights.foreign import check_adapter
from mole_jax.weights.leaf import LAYERS, Leaf

CHECKPOINTS = "checkpoints"
FORMAT = 1
MARGIN_BYTES = 1 << 20
"""Space that must be left beside a checkpoint's arrays: for its own descriptions, and for the run's other files."""
# Bytes of decoded pieces kept; orbax cuts arrays into pieces of at most two gigabytes.
_KEEP = ts.Context({"cache_pool": {"total_bytes_limit": 2_500_000_000}})


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself."""

    architecture: LlavaArchitecture
    adapter: AdapterConfig
    """Ranks, targets, router setting: inference uses the setting that the weights were trained with."""
    trained: tuple[str, ...]
    """Parameter groups that were trained; they are float32 and stored here. Empty for a converted base."""
    prompt: PromptName | None
    """Prompt preset of the training; None for a converted base."""
    image_aspect: ImageAspect | None
    """How images were made square; None for a converted base."""
    base: str | None
    """Folder or hub name of the weights that are not stored here; None: all are, or they are made from `seed`."""
    base_hash: str
    """SHA-256 of the base, by content."""
    seed: int
    """Seed of the weights that no file holds."""
    quantised: Quantisation | None = None
    """How the base was quantised in training. What is stored, here and in the base, is not."""
    format: int = FORMAT
    checksums: dict = dataclasses.field(default_factory=dict)
    """`Checksums` of the arrays that a training run stores; those of versions before have none."""
    masks: Literal["elements", "words"] = "elements"
    """What dropout drew: a number for each element (until version 0.1), or words (`mole_jax.adapters.dropout`)."""

    def to_json(self) -> dict[str, Any]:
        return config_json.to_json(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Meta:
        if value.get("format") != FORMAT:
            raise UserError(
                f"{where}: checkpoint format {value.get('format')} is not {FORMAT}; use the version that wrote it"
            )
        meta = config_json.dataclass_from_json(dict(value), cls, where=where)
        check_sizes(meta.architecture, where=where)
        check_adapter(meta.adapter, where=where)
        return meta


class Damaged(UserError):
    """A checkpoint that cannot be read, and the `reason`."""

    def __init__(self, where: epath.Path, reason: str):
        self.reason = reason
        super().__init__(f"{where}: is damaged ({reason}); put its files back, or name another checkpoint of that run")


@contextmanager
def reading(where: epath.Path) -> Iterator[None]:
    """Turns what a damaged checkpoint leads to, any of a dozen kinds, into `Damaged`.

    Raises:
        UserError: this user may not read it.
    """
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError, MemoryError):
        raise  # too little memory here says nothing about the file
    except Exception as error:
        if isinstance(error, PermissionError) or re.search(r"os_error_code='(1|13)'", str(error)):
            raise UserError(f"{where}: cannot be read (Permission denied); give this user the right to") from None
        raise Damaged(where, " ".join(str(error).split())[:200] or type(error).__name__) from error


def latest_step(folder: epath.Path) -> int | None:
    """Returns the newest complete checkpoint of a run's folder."""
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.is_dir():
        return None
    # On a disk orbax renames a whole checkpoint to its number; in a bucket it marks it, so orbax is asked.
    steps = {int(child.name): child for child in checkpoints.iterdir() if child.name.isdigit()}
    return next((step for step in sorted(steps, reverse=True) if _is_complete(steps[step])), None)


def _is_complete(checkpoint: epath.Path) -> bool:
    return checkpoint.is_dir() and any(checkpoint.iterdir()) and ocp.utils.is_checkpoint_finalized(checkpoint)


def _reader(folder: epath.Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=False)
    # The trainer's own items are named too, or orbax warns that it cannot read them.
    arrays, facts = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
    handlers = {"params": arrays(), "meta": facts(), "optimizer": arrays(), "data": facts()}
    return ocp.CheckpointManager(folder / CHECKPOINTS, options=options, item_handlers=handlers)


def read_meta(folder: epath.Path, step: int) -> Meta:
    """Reads what checkpoint `step` says about itself.

    Raises:
        Damaged: it cannot be read.
        UserError: another version has written it.
    """
    where = folder / CHECKPOINTS / str(step)
    with reading(where), _reader(folder) as reader:
        found = dict(reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
    return Meta.from_json(found, where=str(where))


def stored_shapes(folder: epath.Path, step: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays in checkpoint `step`, by path.

    Raises:
        Damaged: it cannot be read.
    """
    return {path: leaf.shape for path, leaf in _stored_arrays(folder, step).items()}


def _stored_arrays(folder: epath.Path, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    with reading(folder / CHECKPOINTS / str(step)), _reader(folder) as reader:
        tree = reader.item_metadata(step)["params"].tree
        return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for path, leaf in flatten(tree).items()}


def read_params(
    folder: epath.Path, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct], written: Checksums
) -> dict[str, jax.Array]:
    """Reads arrays of checkpoint `step`, each into the shape, type and sharding that `abstract` gives.

    Args:
        written: sums of the arrays as they are stored; those that are read in another type are not compared.

    Raises:
        Damaged: it cannot be read, or an array is not what was written.
        UserError: an array is stored in another shape.
    """
    if not abstract:
        return {}  # as where a run stands on a run: the lower one knows nothing of the upper one's adapters
    where = folder / CHECKPOINTS / str(step) / "params"
    stored = _stored_arrays(folder, step)
    for path, leaf in abstract.items():
        if stored[path].shape != leaf.shape:
            raise UserError(
                f"{where}: {path} has shape {stored[path].shape}, the config asks for {leaf.shape}; "
                "set rank, experts and architecture as they were in the run"
            )
    tree = unflatten(abstract)
    wanted = ocp.args.PyTreeRestore(
        tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    with reading(where.parent), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = flatten(checkpointer.restore(where, args=wanted))
        if path := changed({path: one for path, one in found.items() if one.dtype == stored[path].dtype}, written):
            raise _not_as_written(where.parent, path)
    return found


def _not_as_written(where: epath.Path, path: str) -> Damaged:
    return Damaged(where, f"{path} is not what was written")


def stored_leaves(folder: epath.Path, step: int, written: Checksums | None = None) -> dict[str, Leaf]:
    """Returns the arrays of checkpoint `step` by path, in sorted order and as they were saved, to be read by layer.

    Raises:
        Damaged: it cannot be read; a leaf raises it too, also where it is not what was `written`.
    """
    where = folder / CHECKPOINTS / str(step) / "params"
    return {path: _stored(where, path, (written or {}).get(path)) for path in sorted(stored_shapes(folder, step))}


def _stored(where: epath.Path, path: str, written: Sequence[int] | None) -> Leaf:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": _store(where), "path": path.replace("/", ".") + "/"},
    }
    with reading(where.parent):
        store = ts.open(spec, open=True, read=True).result()
        stacked = LAYERS in path
        if stacked and (store.chunk_layout.read_chunk.shape or (0,))[0] != 1:
            # The trainer's arrays are stored in few large pieces, each to be decoded once and not once a layer.
            store = ts.open(spec, open=True, read=True, context=_KEEP).result()

    def read(layer: int) -> np.ndarray:
        with reading(where.parent):
            value = (store[layer] if stacked else store).read().result()
            if written is not None and checksum(value) != written[layer]:
                raise _not_as_written(where.parent, path)
        return value

    return Leaf(tuple(store.shape), store.dtype.numpy_dtype, stacked, read)


def _store(folder: epath.Path) -> str | dict[str, str]:
    # As a path and not as a URL, in which #, ?, % and | mean something.
    return quote(f"{folder}/", safe=":/") if is_remote(folder) else {"driver": "file", "path": f"{folder}/"}


def _leaf_writer() -> Any:
    """Has orbax write a `Leaf`, one part after the other; its own handlers want whole arrays and write all at once."""
    turn = asyncio.Lock()

    async def write(value: Leaf, store: ts.TensorStore) -> None:
        async with turn:
            if not _by_layer(value):
                await store.write(np.asarray(value))
                return
            for layer in range(len(value)):
                await store[layer].write(value[layer])

    return array_writer(write)


def _by_layer(leaf: Leaf) -> bool:
    """Tells whether each layer is written on its own, into a piece of its own; mere vectors are not."""
    return leaf.stacked and leaf.part_bytes >= 1 << 20


def check_space(folder: epath.Path, arrays: Any, more: str = "") -> None:
    """Checks that the disk of a folder that is there has room for a checkpoint of `arrays`: orbax's threads tell badly.

    Raises:
        UserError: it has not; `more` is added to what can be done.
    """
    if is_remote(folder):
        return
    needed = MARGIN_BYTES + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 2**20:,.1f} MiB are free, the next checkpoint needs {needed / 2**20:,.1f}; free some "
            f"space{more} or choose another folder"
        )


@contextmanager
def storing(folder: epath.Path) -> Iterator[None]:
    """Turns a full disk and the like, which orbax and tensorstore tell in ways of their own, into a `UserError`."""
    _quieten()
    with explained(folder):
        try:
            yield
        except Exception as error:
            if found := re.search(r"os_error_code='(\d+)'", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
            raise


@functools.cache
def _quieten() -> None:
    """Keeps what is told by an exception from being told in other ways too; for good, since threads outlive a block."""
    logging.getLogger("absl").addFilter(_told_by_exception)
    sys.unraisablehook = _without_late_answers(sys.unraisablehook)


def _without_late_answers(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a hook that is silent about what tensorstore answers after a write has failed: orbax listens no more."""

    def told(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return told


def _told_by_exception(record: logging.LogRecord) -> bool:
    """Keeps out of the log what orbax's threads log as an error and raise too: a dozen tracebacks for one full disk."""
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


def write_params(folder: epath.Path, params: Mapping[str, jax.Array] | Mapping[str, Leaf], meta: Meta) -> None:
    """Writes a checkpoint 0 that holds arrays and facts only: a base for later runs.

    Of leaves, one layer is in memory at a time.

    Raises:
        UserError: it cannot be written.
    """
    handlers = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler()), (Leaf, _leaf_writer())
    )
    items = {
        "params": ocp.PyTreeCheckpointHandler(type_handler_registry=handlers),
        "meta": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    # A piece on disk for each layer, so that it is written and read on its own.
    how = {
        path: ocp.SaveArgs(chunk_byte_size=leaf.part_bytes, shard_axes=(0,))
        if isinstance(leaf, Leaf) and _by_layer(leaf)
        else ocp.SaveArgs()
        for path, leaf in params.items()
    }
    where = folder / CHECKPOINTS
    check_space(made(folder), dict(params))
    with storing(where), ocp.CheckpointManager(where, options=options, item_handlers=items) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(unflatten(params), save_args=unflatten(how)),
                meta=ocp.args.JsonSave(meta.to_json()),
            ),
        )
