"""Weights from one format to another; the input's format is recognised."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath

from mole_jax.config import AdapterConfig, MeshConfig
from mole_jax.errors import UserError
from mole_jax.files import absolute, explained, made, write_text
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import group_of
from mole_jax.weights import formats
from mole_jax.weights.format import DTYPES, Export, Format, Given
from mole_jax.weights.leaf import Leaf, as_leaf, types_by_size
from mole_jax.weights.merge import single_expert
from mole_jax.weights.model_card import FILE, model_card
from mole_jax.weights.open import open_source
from mole_jax.weights.source import Source


def convert(
    source_path: str,
    output: str,
    to: str,
    dtype: str | None = None,
    *,
    base: str | None = None,
    alpha: float | None = None,
    expert: int | None = None,
    vision: str | None = None,
) -> str:
    """Writes the weights at `source_path` to the folder `output` and returns what was done, in a line.

    Args:
        source_path: whatever `open_source` recognises.
        output: folder to write; must not hold a model yet.
        to: one of `mole_jax.weights.formats.choices`.
        dtype: type of the written weights, one of `DTYPES`. None: each as it came. In a whole model of Hugging Face's
            a LoRA is rounded to the type of the weight that it is merged into, and whatever else was trained to the
            type of most of the frozen weights.
        base: what the adapters of the input stand on. None: what they name themselves.
        alpha: the scale's numerator, for a released LLaVA-MoLE file. None: as the file says, else twice the rank.
        expert: send every token to this expert (from 0), which leaves a plain LoRA. None: keep the mixture.
        vision: a CLIP's folder or hub name, where the input is a language model; the projector is drawn from seed 0.

    Raises:
        UserError: the input is not recognised or cannot be brought into that format, or the output exists or cannot be
            written.
    """
    with explained(output):
        taken = _holds_model(absolute(output))
    if taken:
        raise UserError(f"{output}: already holds a model; choose another --output or remove it")
    source = open_source(source_path, base=base, alpha=alpha, vision=vision)
    export = Export(source_path, source, _adapter(source, to, expert, where=source_path))
    candidates = formats.written_as(to)
    # Where two formats share a name, the one that holds these adapters.
    chosen = next((one for one in candidates if export.adapter.kind in one.kinds), candidates[0])
    chosen.check(export)
    leaves = _leaves(chosen, export, None if dtype is None else DTYPES[dtype])
    kept = leaves if expert is None else single_expert(leaves, source.adapter, expert, where=source_path)[0]
    card = model_card(export, chosen.library, expert=expert) if chosen.library else None
    assert chosen.write is not None
    with explained(output):  # the input has been opened: what the system refuses from here on is the output
        made(absolute(output))
        chosen.write(dataclasses.replace(export, leaves=kept), output)
        if card is not None and not (absolute(output) / FILE).exists():  # a user's own stays
            write_text(absolute(output) / FILE, card)
    written = " and ".join(one.name for one in types_by_size(leaves.values()))
    bare = "" if source.tokenizer else f"without a tokenizer, which {source_path} lacks; "
    numbers = sum(leaf.size for leaf in leaves.values())
    line = f"{output}: {bare}{len(leaves)} arrays, {numbers:,} numbers as {written}"
    if "vision/patch_embedding" in leaves and source.left_out:
        line += f"; left out: {len(source.left_out)} tensors that no feature comes from ({source.left_out[0]}, …)"
    if source.quantised is not None:
        line += f"; trained on a base in {source.quantised}, of which this has or names the unquantised weights"
    return line


def _holds_model(folder: epath.Path) -> bool:
    given = Given(str(folder), folder, open_source)
    return any(one.recognise(given) for one in formats.FORMATS)


def _adapter(source: Source, to: str, expert: int | None, *, where: str) -> AdapterConfig:
    """Returns the adapters that are written: the source's, or the plain LoRA of its one expert.

    Raises:
        UserError: the format has no place for a setting of the mixture, or it is not made of one expert.
    """
    adapter = source.adapter
    whole = sorted(one.choice for one in formats.FORMATS if one.every_setting)
    if adapter.kind == "mole" and to not in whole:
        for field, usual in (("shared_rank", 0), ("route_by", "token"), ("shared_router", False)):
            if getattr(adapter, field) != usual:
                raise UserError(
                    f"{where}: adapter.{field} is {getattr(adapter, field)}, for which --to {to} has no place; "
                    f"use {_flags(whole)}"
                )
    if expert is None:
        return adapter
    folding = sorted(one.choice for one in formats.FORMATS if one.one_expert)
    if to not in folding:
        raise UserError(f"--expert: goes with {_flags(folding)}, not with --to {to}")
    return single_expert({}, adapter, expert, where=where)[1]


def _flags(choices: Sequence[str]) -> str:
    return " or ".join(f"--to {choice}" for choice in choices)


def _leaves(chosen: Format, export: Export, dtype: np.dtype | None) -> dict[str, Leaf]:
    """Returns the arrays, unread where a file has them. What none has (adapters that never trained) is made now."""
    source = export.source
    spec = ModelSpec.of(source.architecture, source.adapter)
    groups = {path: group_of(parameter) for path, parameter in spec.declarations.items()}
    wanted = [path for path in groups if chosen.wants(export, path, groups[path])]
    found = source.leaves(wanted)
    frozen = [leaf for path, leaf in found.items() if groups[path] not in source.trained]
    rest = next(iter(types_by_size(frozen)), None) if dtype is None else dtype
    # One device: what is converted is written from this host anyway.
    made_as = DTYPES["bfloat16"] if rest is None else rest
    abstract = spec.abstract(make_mesh(MeshConfig(data=1)), source.trained, made_as.name)
    made = spec.initial({path: abstract[path] for path in wanted if path not in found}, source.seed)
    found |= {path: as_leaf(path, np.asarray(leaf)) for path, leaf in made.items()}

    def written(path: str) -> Leaf:
        if chosen.whole and groups[path] == "adapters":
            return found[path]  # not rounded before the sum is
        return as_leaf(path, found[path], rest if chosen.whole and groups[path] in source.trained else dtype)

    return {path: written(path) for path in wanted}
