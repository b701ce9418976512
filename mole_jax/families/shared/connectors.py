"""The connectors' tensors, and the names that the LLaVA-like layouts share."""

from __future__ import annotations

from mole_jax.families.shared.names import Row, affine, linear
from mole_jax.model.architecture import ConnectorArchitecture

CONNECTOR = "multi_modal_projector."
DECODER = "language_model.model."
HEAD = "language_model.lm_head.weight"
TOWER = "vision_tower."


def mlp_rows(connector: ConnectorArchitecture, prefix: str = CONNECTOR) -> tuple[Row, ...]:
    """Returns the table of an MLP of two matrices, with a norm before it if there is one."""
    return (
        *(affine("projector/norm", "I", prefix + "layer_norm") if connector.norm else ()),
        *linear("projector/linear_1", "I D", prefix + "linear_1", bias=connector.bias),
        *linear("projector/linear_2", "D D", prefix + "linear_2", bias=connector.bias),
    )


def canonical(name: str) -> str:
    """Returns a name of any layout that transformers 4 and 5 write for a LLaVA-like model as the hub's files have it.

    Those of the tower come without ``vision_model``.
    """
    if name.startswith(("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.")):
        name = name.removeprefix("model.")
    if name == "model.image_newline":
        return "image_newline"
    if name == "lm_head.weight":
        return HEAD
    if name.startswith(TOWER + "vision_model."):
        return TOWER + name.removeprefix(TOWER + "vision_model.")
    if name.startswith("language_model.") and not name.startswith((DECODER, "language_model.lm_head.")):
        return DECODER + name.removeprefix("language_model.")
    return name


def module_name(name: str) -> str:
    """Returns a canonical name as transformers 5 names the modules of the whole model."""
    name = name.replace(TOWER + "vision_model.", TOWER)
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith(DECODER):
        return "model.language_model." + name.removeprefix(DECODER)
    return "model." + name
