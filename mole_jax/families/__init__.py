"""The families of models, one file each. A new one is a file with a `FAMILY`, and its place in the tuple below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.errors import UserError
from mole_jax.families import internvl, llava, llava_next, llava_onevision, smolvlm
from mole_jax.families.shared.family import Family
from mole_jax.families.shared.processor import Processor
from mole_jax.families.shared.section import Section
from mole_jax.model.architecture import LlavaArchitecture

FAMILIES: Mapping[str, Family] = {
    one.name: one for one in (llava.FAMILY, llava_next.FAMILY, llava_onevision.FAMILY, smolvlm.FAMILY, internvl.FAMILY)
}
"""By name."""


def family_of(arch: LlavaArchitecture) -> Family:
    """Returns the family whose files a model is read from and written to; raises `UserError` if there is none."""
    if arch.family not in FAMILIES:
        raise UserError(f"'{arch.family}' is no family of models, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[arch.family]


def recognised(config: Mapping[str, Any], *, where: str) -> Family:
    """Returns the family that the content of a config.json belongs to; raises `UserError` if it is none's."""
    kind = config.get("model_type")
    found = next((one for one in FAMILIES.values() if kind in one.types), None)
    if found is None:
        types = [repr(kind) for one in FAMILIES.values() for kind in one.types]
        raise UserError(f"{where}: 'model_type' is {kind!r}, only {' or '.join(types)} is supported")
    return found


def read_architecture(config: Any, processor: Any, preprocessor: Any, *, where: str, folder: str) -> LlavaArchitecture:
    """Reads a checkpoint's config.json and the files of its processor.

    Missing fields take the defaults of transformers 5, so that a file means here what it means there.

    Args:
        config: content of config.json.
        processor: content of processor_config.json. None: there is none.
        preprocessor: content of preprocessor_config.json. None: there is none.
        where: what messages call config.json.
        folder: what messages call the folder.

    Raises:
        UserError: it is of no family, a value is malformed, or a field is of a part that is not supported or not known.
    """
    top = Section(config, where)
    top.get("model_type")
    family = recognised(top.values, where=where)
    return family.read(top, Processor.of(processor, preprocessor, where=folder))


def write_architecture(arch: LlavaArchitecture, dtype: str = "bfloat16") -> dict[str, Any]:
    """Returns the config.json with which transformers 5 loads `arch`.

    Args:
        arch: the model; without image start and end vectors, for which no family has a place.
        dtype: type of the weights beside it.

    Raises:
        UserError: `arch` has image vectors.
    """
    family = family_of(arch)
    if arch.image_vectors:
        raise UserError(
            "Hugging Face's LLaVA has no place for learned image start and end vectors (model.image_vectors); "
            "export this model in the released LLaVA-MoLE format instead"
        )
    own = {"architectures": [family.classes], "dtype": dtype, "model_type": family.types[0]}
    return dict(sorted({**own, **family.config(arch)}.items()))
