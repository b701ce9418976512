"""The state dict of the released LLaVA-MoLE (repository forwchen/LLaVA-MoLE), read and written.

Read from a ``.safetensors`` or ``.npz`` file of its keys, or from the ``.pt`` itself where torch is installed
(`mole_jax.weights.safetensors_io`); written as ``llava_mole.safetensors``, whole (for the released code:
``torch.save({"state_dict": load_file(...)}, ...)``). A file may hold the trained weights alone; the frozen ones are the
base's then. It holds neither shapes nor settings: heads and the like are the base's, rank and
experts are seen from the shapes, and what our own files say in their header is else as released: alpha twice the rank,
`dense` routing (its inference mixes all experts), the last vision layer, its own prompt, images padded to squares.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Mapping

import numpy as np
from etils import epath

from mole_jax import config_json
from mole_jax.config import ATTENTION_TARGETS, MLP_TARGETS, AdapterConfig
from mole_jax.errors import UserError
from mole_jax.families.shared.names import LeafSpec
from mole_jax.families.shared.towers import is_clip
from mole_jax.files import made
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.adapter_tensors import AdapterNames, tensors_by_layer
from mole_jax.weights.foreign import (
    HEADER,
    MODULES,
    AdapterFile,
    OwnHeader,
    Row,
    check_adapter,
    own_header,
    read_table,
    spec_row,
    stored_names,
)
from mole_jax.weights.format import Export, Format, Given, not_a_llama, over_base
from mole_jax.weights.hf_checkpoint import foreign_tensors
from mole_jax.weights.leaf import Leaf, Leaves, as_leaf
from mole_jax.weights.names import leaf_specs
from mole_jax.weights.safetensors_io import STATE_DICT_SUFFIXES, open_state_dict, write_file
from mole_jax.weights.sources import LayeredSource

FILE = "llava_mole.safetensors"
_LLM = "llm_model.base_model.model."
_LAYER = _LLM + "model.layers.{layer}."
NAMES = AdapterNames(
    lora=_LAYER + "{module}.lora_{side}.default.weight",
    expert=_LAYER + "mlp.moe_{projection}.{expert}.lora_{side}",
    router={"kernel": _LAYER + "mlp.router.weight", "bias": _LAYER + "mlp.router.bias"},
)
VECTORS = {
    "image_vectors/start": "in_adaptor.visual_start_token",
    "image_vectors/end": "in_adaptor.visual_end_token",
}
_LLM_LAYERS = "language_model.model.layers.{layer}."
# Where the tensors of a plain LLaVA are: Hugging Face's prefix and theirs, the longest first.
_PREFIXES = {
    _LLM_LAYERS + "mlp.": _LAYER + "mlp.original_module.",
    "language_model.": _LLM,
    "multi_modal_projector.linear_1.": "in_adaptor.projector.0.",
    "multi_modal_projector.linear_2.": "in_adaptor.projector.2.",
    "vision_tower.": "vit.vision_tower.",
}
_EMBEDDING = _LLM + "model.embed_tokens.weight"
_COPY = "in_adaptor.text_embed.weight"  # the embedding, once more
_IGNORED = re.compile(r"(embeddings\.position_ids|rotary_emb\.inv_freq)$")
_RELEASED_LAYER = -1


def is_llava_mole(path: epath.Path) -> bool:
    """Tells whether `path` is a file of a state dict, or a folder with ours."""
    return (path.is_file() and path.suffix in STATE_DICT_SUFFIXES) or (path / FILE).is_file()


def check_llava_mole(adapter: AdapterConfig, arch: LlavaArchitecture, *, where: str) -> None:
    """Raises `UserError` with the reason if the released code would not compute a model with these adapters."""
    if (reason := not_a_llama(arch, "llava")) is not None:
        pass
    elif not is_clip(arch.vision):
        reason = "has a SigLIP, the released code a CLIP"
    elif adapter.kind != "mole":
        reason = f"has no routed experts (adapter.kind {adapter.kind})"
    elif set(adapter.targets) != {*ATTENTION_TARGETS, *MLP_TARGETS}:
        reason = "has adapters on some projections only (adapter.targets), the released code on all seven"
    elif adapter.scale != "standard":
        reason = f"has adapter.scale {adapter.scale}, the released code scales by alpha / rank"
    elif adapter.vision_targets:
        reason = "has LoRA on the vision tower (adapter.vision_targets), the released code has none there"
    elif adapter.router_gradient == "gate_scaled":
        reason = "scales experts by their probability (adapter.router_gradient gate_scaled), the released code does not"
    elif not arch.image_vectors:
        reason = "has no image start and end vectors (model.image_vectors), the released code always puts them"
    elif arch.feature_layer not in (_RELEASED_LAYER, arch.vision.layers) or arch.feature_select != "patch":
        reason = f"takes vision layer {arch.feature_layer} ({arch.feature_select}), the released code -1 (patch)"
    if reason:
        raise UserError(f"{where}: {reason}; convert it --to mole or --to hf instead")


def _tensors(adapter: AdapterConfig, arch: LlavaArchitecture, leaves: Leaves) -> dict[str, Leaf]:
    """Returns every tensor by its name in the file, unread where the leaves are. No router bias is one of zeros."""
    tensors = tensors_by_layer(NAMES, adapter, arch, leaves)
    for path, spec in leaf_specs(arch).items():
        theirs = foreign_tensors({path: spec}, leaves).values()
        tensors |= dict(zip(_frozen_names(spec), theirs, strict=True))
    for path, name in VECTORS.items():
        tensors[name] = as_leaf("", np.asarray(leaves[path])[None, None])
    if not adapter.router_bias:
        zeros = np.zeros(adapter.experts, np.float32)
        for layer in range(arch.decoder.layers):
            tensors[NAMES.router["bias"].format(layer=layer)] = as_leaf("", zeros)
    return tensors | {_COPY: tensors[_EMBEDDING]}


def read_llava_mole(path: epath.Path, arch: LlavaArchitecture, alpha: float | None = None) -> AdapterFile:
    """Reads a state dict.

    Args:
        path: the file, or a folder with ours.
        arch: the base's.
        alpha: numerator of the scale ``alpha / rank``. None: as our header says, else twice the rank.

    Raises:
        UserError: the file cannot be read, or a tensor is missing, unknown or of the wrong shape.
    """
    if alpha is not None and alpha <= 0:
        raise UserError(f"{path}: --alpha {alpha:g} is no scale; give a number over 0")
    path = path if path.is_file() else path / FILE
    tensors = open_state_dict(path)
    stored = {plain: name for plain, name in stored_names(tensors, _plain, path).items() if not _IGNORED.search(name)}
    shapes = {name: tensors.shapes[own] for name, own in stored.items()}
    header = own_header(tensors.metadata, path)
    biases = [NAMES.router["bias"].format(layer=layer) for layer in range(arch.decoder.layers)]
    # A bias of zeros is none, and without one the model is a Mixtral.
    has_bias = any(name in stored and np.any(np.asarray(tensors.read(stored[name])) != 0) for name in biases)
    adapter = dataclasses.replace(_adapter(path, shapes, header, alpha), router_bias=has_bias)
    if _EMBEDDING in shapes:
        # Vicuna's vocabulary is smaller than that of a LLaVA folder, which has <image> and padding.
        arch = dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, vocab=shapes[_EMBEDDING][0]))
    image_vectors = any(name in stored for name in VECTORS.values())
    arrays = read_table(
        tensors,
        _frozen_table(arch, stored) | NAMES.table(adapter, arch) | (_vectors_table(arch) if image_vectors else {}),
        where=path,
        what="tensors do not fit a LLaVA-MoLE on this base",
        asks="the base",
        names=stored,
        ignored=(*biases, _COPY),
    )
    return AdapterFile(
        adapter=adapter,
        arrays=arrays,
        trained=("adapters", "router", "projector"),
        changes={
            "decoder": arch.decoder,
            "image_vectors": image_vectors,
            "feature_layer": _RELEASED_LAYER,
            "feature_select": "patch",
            **header.changes,
        },
        prompt=header.prompt or "llava_mole",
        image_aspect=header.image_aspect or "pad",
    )


def _frozen_table(arch: LlavaArchitecture, stored: Collection[str]) -> dict[str, Row]:
    """Returns the arrays of a plain LLaVA: the projector, and of the rest what the file has."""
    table = {}
    for path, spec in leaf_specs(arch).items():
        names = _frozen_names(spec)
        if path.startswith("projector/") or any(name in stored for name in names):
            table[path] = spec_row(spec, names)
    return table


def _vectors_table(arch: LlavaArchitecture) -> dict[str, Row]:
    shape = (1, 1, arch.decoder.width)
    return {path: Row((name,), shape, lambda names, read: read(names[0])[0, 0]) for path, name in VECTORS.items()}


def _adapter(
    path: epath.Path, shapes: Mapping[str, tuple[int, ...]], header: OwnHeader, alpha: float | None
) -> AdapterConfig:
    first = NAMES.lora.format(layer=0, module=MODULES["q_proj"], side="A")
    routers = NAMES.router["kernel"].format(layer=0)
    if len(shapes.get(first, ())) != 2 or len(shapes.get(routers, ())) != 2:
        raise UserError(f"{path}: is no LLaVA-MoLE state dict, it has no {first} or no {routers}")
    rank, experts = shapes[first][0], shapes[routers][0]
    adapter = header.adapter
    if adapter is None:
        adapter = AdapterConfig(kind="mole", alpha=2.0 * rank, router_gradient="dense", balance_loss="pooled")
    alpha = adapter.alpha if alpha is None else alpha
    return check_adapter(dataclasses.replace(adapter, rank=rank, experts=experts, alpha=alpha), where=path)


def _frozen_names(spec: LeafSpec) -> list[str]:
    prefix = next(prefix for prefix in _PREFIXES if spec.pattern.startswith(prefix))
    pattern = _PREFIXES[prefix] + spec.pattern.removeprefix(prefix)
    if ".self_attn." in pattern and pattern.startswith(_LLM):
        pattern = pattern.removesuffix("weight") + "base_layer.weight"
    return [pattern.format(layer=layer) for layer in range(spec.shape[0])] if spec.stacked else [pattern]


def _plain(name: str) -> str:
    """Returns a name as a model with adapters on every attention projection has it."""
    bare = re.fullmatch(rf"({re.escape(_LLM)}model\.layers\.\d+\.self_attn\.[qkvo]_proj)\.weight", name)
    return bare[1] + ".base_layer.weight" if bare else name


def _read(given: Given) -> LayeredSource:
    return over_base(given, None, functools.partial(read_llava_mole, alpha=given.alpha))


def _check(export: Export) -> None:
    check_llava_mole(export.adapter, export.architecture, where=export.where)


def _write(export: Export, folder: str) -> None:
    """Writes the whole state dict, each tensor in the type of its leaf and one at a time."""
    output = made(epath.Path(folder))
    header = {"adapter": config_json.to_json(export.adapter), **export.settings}
    metadata = {"format": "pt", HEADER: json.dumps(header)}
    write_file(output / FILE, _tensors(export.adapter, export.architecture, export.leaves), metadata)


FORMAT = Format(
    name="llava_mole",
    reads="a released LLaVA-MoLE file (.safetensors, .npz, .pt)",
    recognise=lambda given: is_llava_mole(given.path),
    options=("base", "alpha"),
    read=_read,
    writes="the released LLaVA-MoLE's state dict",
    kinds=("mole",),
    check=_check,
    write=_write,
)
