"""A Hugging Face folder's small files, to and from `LlavaArchitecture`; what they say is in `mole_jax.families`."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from mole_jax.errors import UserError
from mole_jax.families import read_architecture
from mole_jax.families.shared.decoders import NO_ID
from mole_jax.families.shared.section import Section
from mole_jax.files import read_json
from mole_jax.model.architecture import LlavaArchitecture

CONFIG, GENERATION = "config.json", "generation_config.json"
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"


def open_architecture(folder: epath.Path) -> LlavaArchitecture:
    """Reads a folder's config, processor and generation settings.

    Raises:
        UserError: a file is missing or malformed, or the model is of no family or has a part that is not supported.
    """

    def content(name: str) -> Any:
        return read_json(folder / name) if (folder / name).is_file() else None

    config = read_json(folder / CONFIG)
    arch = read_architecture(
        config, content(PROCESSOR), content(PREPROCESSOR), where=str(folder / CONFIG), folder=str(folder)
    )
    return with_generation_file(arch, folder)


def architecture_from_hf(config: dict[str, Any], *, where: str) -> LlavaArchitecture:
    """Reads the content of a config.json alone, of a family whose pictures need no other file.

    Raises:
        UserError: as `mole_jax.families.read_architecture`.
    """
    return read_architecture(config, None, None, where=where, folder=where.rpartition("/")[0] or ".")


def with_generation(arch: LlavaArchitecture, config: Any, *, where: str) -> LlavaArchitecture:
    """Returns `arch` with the ids of a generation_config.json that end an answer; what generates asks that file.

    Raises:
        UserError: they are no ids.
    """
    decoder = arch.decoder
    known = [one for one in decoder.eos_ids if one != NO_ID]
    first, *others = list(dict.fromkeys([*known, *Section(config, where).ids("eos_token_id")])) or [NO_ID]
    decoder = dataclasses.replace(decoder, eos_id=first, other_eos_ids=tuple(others))
    return dataclasses.replace(arch, decoder=decoder)


def with_generation_file(arch: LlavaArchitecture, folder: epath.Path) -> LlavaArchitecture:
    """Returns `arch` with what a folder's generation_config.json adds, if there is one.

    Raises:
        UserError: it is malformed, or no file names a token that ends an answer.
    """
    where = folder / GENERATION
    if where.is_file():
        arch = with_generation(arch, read_json(where), where=str(where))
    if arch.decoder.eos_id == NO_ID:
        raise UserError(
            f"{folder / CONFIG}: neither its text_config nor {GENERATION} has an 'eos_token_id'; add the id that ends "
            "an answer to one of them"
        )
    return arch
