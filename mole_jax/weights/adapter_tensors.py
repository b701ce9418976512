"""Adapters tensor by tensor, for files that keep one tensor for each layer, expert and side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mole_jax.config import MLP_TARGETS, AdapterConfig
from mole_jax.families.shared.names import LeafSpec
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.foreign import MODULES, ReadTensor, Row, target_path, vision_path
from mole_jax.weights.hf_checkpoint import foreign_tensors
from mole_jax.weights.leaf import Leaf, Leaves, as_leaf, tensor, widest
from mole_jax.weights.names import leaf_specs

_MLP = "decoder/layers/mlp/"


@dataclasses.dataclass(frozen=True)
class AdapterNames:
    """A format's names, with places for `layer`, `module` (self_attn.q_proj), `projection` (gate), `expert`, `side`."""

    lora: str
    """A plain LoRA: side A (R, D_in), side B (D_out, R)."""
    expert: str = ""
    """LoRA of one expert, likewise."""
    router: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of the router's kernel (E, D), and of its bias (E) where the format has one."""
    vision: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """A plain LoRA of each projection of the vision tower, with places for `layer` and `side`."""

    def of(self, adapter: AdapterConfig, arch: LlavaArchitecture) -> dict[str, list[str]]:
        """Returns our paths of adapters and router, and their names: layer by layer, within one expert by expert."""
        names: dict[str, list[str]] = {}
        layers = arch.decoder.layers
        for target in adapter.vision_targets:
            for side in "AB":
                names[f"{vision_path(target)}/adapter/{side.lower()}"] = [
                    self.vision[target].format(layer=layer, side=side) for layer in range(arch.vision.layers)
                ]
        for target, module in MODULES.items():
            routed = adapter.kind == "mole" and target in MLP_TARGETS
            pattern, experts = (self.expert, adapter.experts) if routed else (self.lora, 1)
            projection = target.removesuffix("_proj")
            for side in "AB" if target in adapter.targets else "":
                names[f"{target_path(target)}/adapter/{side.lower()}"] = [
                    pattern.format(layer=layer, module=module, projection=projection, expert=expert, side=side)
                    for layer in range(layers)
                    for expert in range(experts)
                ]
        for part in _router_parts(adapter):
            names[f"{_MLP}router/{part}"] = [self.router[part].format(layer=layer) for layer in range(layers)]
        return names

    def table(self, adapter: AdapterConfig, arch: LlavaArchitecture) -> dict[str, Row]:
        """Returns the same as a table to read by (`mole_jax.weights.foreign.read_table`)."""

        def row(path: str, names: Sequence[str]) -> Row:
            def array(names: Sequence[str], read: ReadTensor) -> np.ndarray:
                return join(path, [read(name) for name in names], adapter)

            return Row(names, foreign_shape(path, adapter, arch), array)

        return {path: row(path, names) for path, names in self.of(adapter, arch).items()}


def _router_parts(adapter: AdapterConfig) -> tuple[str, ...]:
    if adapter.kind != "mole":
        return ()
    return ("kernel", "bias") if adapter.router_bias else ("kernel",)


def foreign_shape(path: str, adapter: AdapterConfig, arch: LlavaArchitecture) -> tuple[int, ...]:
    """Returns the shape of each tensor that the array at `path` is cut into."""
    if "router" in path:
        return (adapter.experts,) if path.endswith("bias") else (adapter.experts, arch.decoder.width)
    module, side = path.split("/adapter/")
    d_out, d_in = leaf_specs(arch)[module + "/kernel"].foreign_shape
    return (adapter.rank, d_in) if side == "a" else (d_out, adapter.rank)


def tensors_by_layer(
    names: AdapterNames, adapter: AdapterConfig, arch: LlavaArchitecture, leaves: Leaves
) -> dict[str, Leaf]:
    """Returns every tensor of adapters and router by its name, unread where the leaves are."""
    tensors = {}
    for path, own in names.of(adapter, arch).items():
        layers = arch.vision.layers if path.startswith("vision/") else arch.decoder.layers
        shape, parts = foreign_shape(path, adapter, arch), len(own) // layers
        for number, name in enumerate(own):

            def read(path: str = path, layer: int = number // parts, part: int = number % parts) -> np.ndarray:
                return _cut_layer(path, leaves[path][layer], adapter)[part]

            tensors[name] = tensor(shape, as_leaf(path, leaves[path]).dtype_of(number // parts), read)
    return tensors


def join(path: str, parts: Sequence[np.ndarray], adapter: AdapterConfig) -> np.ndarray:
    """Returns the array at `path` from its tensors in the order of `AdapterNames.of`; `tensors_by_layer` undone."""
    dtype = widest(part.dtype for part in parts)
    parts = [part.astype(dtype, copy=False) for part in parts]
    if path.endswith("/bias"):
        return np.stack(parts)
    parts = [part.T for part in parts]
    if _has_experts(path, adapter):
        axis, count = (1 if path.endswith("/a") else 0), adapter.experts
        parts = [np.concatenate(parts[i : i + count], axis=axis) for i in range(0, len(parts), count)]
    return np.stack(parts)


def projector_tensors(arch: LlavaArchitecture, leaves: Leaves) -> dict[str, Leaf]:
    """Returns the projector's tensors by Hugging Face's name, unread; none where `leaves` has no projector."""
    return foreign_tensors({path: spec for path, spec in projector_specs(arch).items() if path in leaves}, leaves)


def projector_specs(arch: LlavaArchitecture) -> dict[str, LeafSpec]:
    """Returns the projector's arrays by path; files of adapters have them beside, where it was trained."""
    return {path: spec for path, spec in leaf_specs(arch).items() if path.startswith("projector/")}


def _cut_layer(path: str, layer: np.ndarray, adapter: AdapterConfig) -> list[np.ndarray]:
    if path.endswith("/bias"):
        return [layer]
    if not _has_experts(path, adapter):
        return [layer.T]
    return [expert.T for expert in np.split(layer, adapter.experts, axis=1 if path.endswith("/a") else 0)]


def _has_experts(path: str, adapter: AdapterConfig) -> bool:
    return adapter.kind == "mole" and path.startswith(_MLP) and "/adapter/" in path
