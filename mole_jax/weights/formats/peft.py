"""Plain LoRA as a PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT 0.21).

=================================================================================  ===========  =====================
tensor, after ``base_model.model.``                                                shape        ours
=================================================================================  ===========  =====================
``model.language_model.layers.{layer}.{module}.lora_A.weight``                     (R, D_in)    A (D_in, R), transposed
``model.language_model.layers.{layer}.{module}.lora_B.weight``                     (D_out, R)   B (R, D_out), transposed
``model.vision_tower.encoder.layers.{layer}.{module}.lora_{A,B}.weight``           likewise     of the vision tower
``model.multi_modal_projector.linear_{1,2}.{weight,bias}`` (``modules_to_save``)   as in HF     the trained projector
=================================================================================  ===========  =====================

These are LLaVA's modules; other families' are in their files (`mole_jax.families`). Files of transformers 4 say
``language_model.model.layers``, those of original LLaVA ``model.layers``, with the projector apart in
``non_lora_trainables.bin`` as ``model.mm_projector.{0,2}``; all are read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Mapping

from etils import epath

from mole_jax.config import VISION_TARGETS, AdapterConfig
from mole_jax.errors import UserError
from mole_jax.families import family_of
from mole_jax.families.shared.family import Family
from mole_jax.files import made, read_json, write_json
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.terminal import shortened
from mole_jax.weights.adapter_tensors import AdapterNames, projector_specs, projector_tensors, tensors_by_layer
from mole_jax.weights.foreign import (
    HEADER,
    MODULES,
    AdapterFile,
    own_header,
    read_table,
    spec_row,
    stored_names,
    vision_path,
)
from mole_jax.weights.format import Export, Format, Given, check_trained, over_base, trained_arrays
from mole_jax.weights.formats.llava import renamed
from mole_jax.weights.names import leaf_specs
from mole_jax.weights.peft_config import CONFIG, adapter_from_peft, base_of, peft_config
from mole_jax.weights.safetensors_io import TensorFolder, write_file
from mole_jax.weights.sources import LayeredSource

TENSORS, TORCH_TENSORS = "adapter_model.safetensors", "adapter_model.bin"
PROJECTOR_APART = "non_lora_trainables.bin"
PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<layers>[\w.]+\.layers?)\.(\d+)\.(?P<module>[\w.]+)\.lora_[AB]\.weight")


def names_of(arch: LlavaArchitecture) -> AdapterNames:
    """Returns the names of LoRA tensors in the layout of the family's files, which `Family.canonical` gives."""
    specs = leaf_specs(arch)
    kernel = specs["decoder/layers/attention/q_proj/kernel"].pattern
    tower = {target: specs[f"{vision_path(target)}/kernel"].pattern for target in VISION_TARGETS}
    return AdapterNames(
        kernel.removesuffix("self_attn.q_proj.weight") + "{module}.lora_{side}.weight",
        vision={target: name.removesuffix("weight") + "lora_{side}.weight" for target, name in tower.items()},
    )


def written_names(arch: LlavaArchitecture) -> AdapterNames:
    """Returns the same as PEFT writes them: modules of transformers 5."""
    names, module = names_of(arch), family_of(arch).module
    return AdapterNames(
        PREFIX + module(names.lora),
        vision={target: PREFIX + module(name) for target, name in names.vision.items()},
    )


def check_peft(adapter: AdapterConfig, arch: LlavaArchitecture, trained: Collection[str] = (), *, where: str) -> None:
    """Raises `UserError` with the reason if PEFT has no place for a model with these adapters."""
    if adapter.kind == "mole":
        raise UserError(
            f"{where}: PEFT has no LoRA experts routed token by token; convert it --to mole, or fold one with --expert"
        )
    if adapter.kind != "lora":
        raise UserError(f"{where}: has no LoRA to export (adapter.kind {adapter.kind}); convert it --to hf")
    if arch.image_vectors:
        raise UserError(
            f"{where}: a PEFT adapter has no place for learned image start and end vectors (model.image_vectors); "
            "convert it --to mole"
        )
    if arch.image_newline and "projector" in trained:
        raise UserError(
            f"{where}: a PEFT adapter has no place for a trained image_newline, which is no module; "
            "convert it --to mole"
        )


def read_peft(folder: epath.Path, arch: LlavaArchitecture) -> AdapterFile:
    """Reads a LoRA of the language model, with or without a projector.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors or .bin, and whatever original LLaVA put beside.
        arch: the base's.

    Raises:
        UserError: as `adapter_from_peft`, or a tensor is missing, unknown, of the wrong shape or of another rank than
            the config says.
    """
    where = folder / CONFIG
    adapter = adapter_from_peft(read_json(where), where)
    file = next((folder / name for name in (TENSORS, TORCH_TENSORS) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: holds neither {TENSORS} nor {TORCH_TENSORS}; copy the whole folder")
    files = TensorFolder([file, *folder.glob(PROJECTOR_APART)])
    names, family = names_of(arch), family_of(arch)
    stored = stored_names(files, functools.partial(_canonical, family=family), file)
    layers = names.lora.partition(".{layer}")[0]
    modules = {found["module"] for name in stored if (found := _LORA.fullmatch(name)) and found["layers"] == layers}
    adapter = dataclasses.replace(
        adapter,
        targets=tuple(name for name, one in MODULES.items() if one in modules),
        vision_targets=tuple(
            target for target, name in names.vision.items() if name.format(layer=0, side="A") in stored
        ),
    )
    _check_ranks(folder, adapter.rank, {name: files.shapes[own] for name, own in stored.items()})
    if not adapter.targets:
        first = next(iter(files.shapes), "nothing")
        raise UserError(f"{file}: holds no LoRA of the language model's projections, but {shortened(first)}")
    table, projector = names.table(adapter, arch), projector_specs(arch)
    has_projector = any(name in stored for spec in projector.values() for name in spec.names)
    if has_projector:
        table |= {path: spec_row(spec) for path, spec in projector.items()}
    what = "tensors do not fit a LoRA of this base"
    arrays = read_table(files, table, where=file, what=what, asks="the base", names=stored)
    said = own_header(files.metadata, file)
    return AdapterFile(
        adapter,
        arrays,
        ("adapters", "projector") if has_projector else ("adapters",),
        changes=said.changes,
        prompt=said.prompt,
        image_aspect=said.image_aspect,
    )


def _check_ranks(folder: epath.Path, rank: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    # A's first axis alone would do, but a B of another rank is the same mistake.
    ranks = {
        shape[0 if ".lora_A." in name else -1] for name, shape in shapes.items() if _LORA.fullmatch(name) and shape
    }
    if ranks - {rank}:
        raise UserError(
            f"{folder}: {CONFIG} says rank (r) {rank}, the tensors have {', '.join(map(str, sorted(ranks)))}; "
            "the two are no pair"
        )


def _canonical(name: str, family: Family) -> str:
    # A model's own state dict, as DeepSpeed saves it, has the adapter's name too; PEFT calls it "default".
    name = name.removeprefix(PREFIX).replace(".modules_to_save.default.", ".")
    name = re.sub(r"(\.lora_[AB])\.default\.weight$", r"\1.weight", name)
    # Of original LLaVA's names none is like Hugging Face's; the general "model." would be.
    original = name.startswith(("model.layers.", "model.mm_projector."))
    return family.canonical(renamed(name) if original else name)


def _read(given: Given) -> LayeredSource:
    where = given.path / CONFIG
    return over_base(given, base_of(read_json(where), where, named=given.base is not None), read_peft)


def _check(export: Export) -> None:
    check_peft(export.adapter, export.architecture, export.source.trained, where=export.where)
    check_trained(export)


def _write(export: Export, folder: str) -> None:
    """Writes a plain LoRA, and the projector where it was trained, as PEFT does; and what AutoProcessor asks for.

    The base keeps its embedding, so where that has no free row no token is added.
    """
    adapter, arch, leaves = export.adapter, export.architecture, export.leaves
    family = family_of(arch)
    tensors = tensors_by_layer(written_names(arch), adapter, arch, leaves)
    projector = projector_tensors(arch, leaves)
    tensors |= {PREFIX + family.module(name): one for name, one in projector.items()}
    output = made(epath.Path(folder))
    # PEFT's own loader asks for torch's mark in the header.
    write_file(output / TENSORS, tensors, {"format": "pt", HEADER: json.dumps(export.settings)})
    export.beside(grows=False).write(output)
    config = peft_config(
        adapter,
        export.base_name,
        bool(projector),
        decoder=family.decoder,
        connector=family.connector,
        tower=family.tower,
        tower_modules=[names_of(arch).vision[target] for target in adapter.vision_targets],
    )
    write_json(output / CONFIG, config, indent=2)


FORMAT = Format(
    name="peft",
    reads="a PEFT adapter folder",
    recognise=lambda given: (given.path / CONFIG).is_file(),
    options=("base",),
    read=_read,
    writes="a PEFT adapter folder (plain LoRA)",
    kinds=("lora",),
    one_expert=True,
    library="peft",
    wants=trained_arrays,
    check=_check,
    write=_write,
)
