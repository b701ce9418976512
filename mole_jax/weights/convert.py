"""Weights from one format to another; the input's format is recognised."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from mole_jax.config import AdapterConfig, MeshConfig
from mole_jax.errors import UserError
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parameters import group_of
from mole_jax.tokenizer import Tokenizer
from mole_jax.training.state import ModelSpec
from mole_jax.weights import llava_mole, mixlora, mole_folder, run
from mole_jax.weights.adapter_source import AdapterSource
from mole_jax.weights.hf import architecture_to_hf, write_hf
from mole_jax.weights.leaf import Leaf, as_leaf
from mole_jax.weights.merge import merged, single_expert
from mole_jax.weights.mixtral import check_mixtral, write_mixtral
from mole_jax.weights.peft import check_peft, write_peft
from mole_jax.weights.source import RunSource, Source, locate, open_source

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_ADAPTERS_ONLY = ("peft", "mixlora", "mole")
_TAKEN = ("config.json", mole_folder.CONFIG, llava_mole.FILE)

Leaves = dict[str, Leaf]


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
        to: one of `mole_jax.convert.FORMATS`.
        dtype: type of the written weights, float32 or bfloat16. None: bfloat16 for frozen weights and for all of a HF
            folder, float32 for adapters and whatever else was trained.
        base: what the adapters of the input stand on. None: what they name themselves.
        alpha: the scale's numerator, for a released LLaVA-MoLE file. None: as the file says, else twice the rank.
        expert: send every token to this expert (from 0), which leaves a plain LoRA. None: keep the mixture.
        vision: a CLIP's folder or hub name, where the input is a language model; the projector is drawn from seed 0.

    Raises:
        UserError: the input is not recognised or cannot be brought into that format, or the output exists.
    """
    folder = run.absolute(output)
    if any((folder / name).exists() for name in _TAKEN) or run.latest_step(folder) is not None:
        raise UserError(f"{output}: already holds a model; choose another --output or remove it")
    source = open_source(source_path, base=base, alpha=alpha, vision=vision)
    _check(source, to, expert, where=source_path)
    spec = ModelSpec.of(source.architecture, source.adapter)
    leaves = _leaves(spec, source, dtype or "bfloat16", _wanted(spec, source, to))
    if to == "run":
        written = _write_run(folder, source, leaves, dtype)
    else:
        written = _write_foreign(output, source, leaves, to, dtype, expert, where=source_path)
    return f"{output}: {len(leaves)} arrays, {sum(leaf.size for leaf in leaves.values()):,} numbers as {written}"


def _check(source: Source, to: str, expert: int | None, *, where: str) -> None:
    """Refuses what cannot be, before a long time of loading."""
    adapter = source.adapter
    if to not in ("run", "mole") and adapter.kind == "mole":
        for field, usual in (("shared_rank", 0), ("route_by", "token"), ("shared_router", False)):
            if getattr(adapter, field) != usual:
                raise UserError(
                    f"{where}: adapter.{field} is {getattr(adapter, field)}, for which --to {to} has no place; "
                    "use --to mole or --to run"
                )
    if expert is not None:
        if to not in ("hf", "peft"):
            raise UserError(f"--expert: goes with --to hf or --to peft, not with --to {to}")
        adapter = single_expert({}, adapter, expert, where=where)[1]
    if to == "hf":
        architecture_to_hf(source.architecture)  # refuses learned image vectors
        if adapter.kind == "mole":
            check_mixtral(adapter, where=where)
    if to == "peft":
        check_peft(adapter, source.architecture, where=where)
    if to == "mixlora":
        mixlora.check_mixlora(adapter, source.architecture, where=where)
    if to == "llava_mole":
        llava_mole.check_llava_mole(adapter, source.architecture, where=where)
    if to == "mole" and _base(source) is None:
        raise UserError(f"{where}: stands on no base that has a name, so its adapters cannot travel alone; use --to hf")
    if to == "run" and isinstance(source, RunSource) and adapter.kind != "none":
        raise UserError(f"{where}: is a run with {adapter.kind} adapters already; convert it --to hf")
    beyond = sorted({"vision", "decoder"} & set(source.trained))
    if to in ("peft", "mixlora") and beyond:
        raise UserError(f"{where}: its {' and '.join(beyond)} was trained too, which adapters leave out; use --to hf")


def _wanted(spec: ModelSpec, source: Source, to: str) -> Callable[[str], bool]:
    """Tells which arrays the format holds."""
    if to in _ADAPTERS_ONLY:
        groups = {*source.trained, "adapters", "router"}
        return lambda path: group_of(spec.declarations[path]) in groups
    if to == "run" and isinstance(source, AdapterSource):
        return lambda path: path in source.paths
    return lambda path: True


def _leaves(spec: ModelSpec, source: Source, frozen_dtype: str, wanted: Callable[[str], bool]) -> Leaves:
    """Returns the arrays, unread where a file has them. What none has (adapters that never trained) is made now."""
    # One device: what is converted is written from this host anyway.
    abstract = spec.abstract(make_mesh(MeshConfig(data=1)), source.trained, frozen_dtype)
    abstract = {path: leaf for path, leaf in abstract.items() if wanted(path)}
    found = source.leaves(abstract)
    made = spec.initial({path: leaf for path, leaf in abstract.items() if path not in found}, source.seed)
    found |= {path: as_leaf(path, np.asarray(leaf), np.dtype(leaf.dtype)) for path, leaf in made.items()}
    return {path: found[path] for path in abstract}


def _base(source: Source) -> tuple[str, str] | None:
    """Returns name and hash of what the adapters of `source` stand on, if it has a name."""
    if isinstance(source, AdapterSource):
        return locate(source.base_name), source.base.content_hash()
    if isinstance(source, RunSource) and source.base_name is not None:
        return locate(source.base_name), source.meta.base_hash
    return None


def _meta(source: Source, adapter: AdapterConfig, trained: tuple[str, ...]) -> run.Meta:
    base = _base(source) if trained else None
    return run.Meta(
        architecture=source.architecture,
        adapter=adapter,
        trained=trained,
        prompt=source.prompt,
        image_aspect=source.image_aspect,
        base=base[0] if base else None,
        base_hash=base[1] if base else source.content_hash(),
        seed=source.seed,
    )


def _prompting(source: Source) -> dict[str, str | None]:
    return {"prompt": source.prompt, "image_aspect": source.image_aspect}


def _write_run(folder, source: Source, leaves: Leaves, dtype: str | None) -> str:
    frozen = dtype or "bfloat16"
    if isinstance(source, AdapterSource):
        run.write_params(folder, leaves, _meta(source, source.adapter, source.trained))
    else:
        leaves = {path: as_leaf(path, leaf, DTYPES[frozen]) for path, leaf in leaves.items()}
        run.write_params(folder, leaves, _meta(source, AdapterConfig(kind="none"), ()))
    if source.tokenizer is not None:
        Tokenizer.load(source.tokenizer).save(str(folder))
    return frozen if not isinstance(source, AdapterSource) else f"float32 (frozen ones {frozen})"


def _write_foreign(
    output: str,
    source: Source,
    leaves: Leaves,
    to: str,
    dtype: str | None,
    expert: int | None,
    *,
    where: str,
) -> str:
    adapter, arch = source.adapter, source.architecture
    if expert is not None:
        leaves, adapter = single_expert(leaves, adapter, expert, where=where)
    whole, own = dtype or "bfloat16", dtype or "float32"
    base = _base(source)
    if to == "hf" and adapter.kind == "mole":
        write_mixtral(output, arch, adapter, leaves, DTYPES[whole], where=where, tokenizer=source.tokenizer)
    elif to == "hf":
        write_hf(output, arch, merged(leaves, adapter, where=where), DTYPES[whole], tokenizer=source.tokenizer)
    elif to == "llava_mole":
        llava_mole.write_llava_mole(output, adapter, arch, leaves, where=where, settings=_prompting(source))
        return f"float32 (frozen ones {whole})"
    elif to == "mixlora":
        own_base, settings = base and base[0], _prompting(source)
        mixlora.write_mixlora(
            output, adapter, leaves, arch, base=own_base, where=where, dtype=DTYPES[own], settings=settings
        )
    else:
        arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
        if to == "peft":
            write_peft(output, adapter, arrays, arch, base=base and base[0], where=where, dtype=DTYPES[own])
        else:
            groups = tuple(dict.fromkeys((*source.trained, "adapters", "router")))
            mole_folder.write_mole(output, _meta(source, adapter, groups), arrays, DTYPES[own])
    if to in _ADAPTERS_ONLY and source.tokenizer is not None:
        Tokenizer.load(source.tokenizer).save(output)
    return whole if to == "hf" else own
