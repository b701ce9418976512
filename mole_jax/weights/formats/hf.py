"""Hugging Face's folders: ``config.json`` beside safetensors, named as the family's files are. A LoRA is merged."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from mole_jax.config import ImageAspect, PromptName
from mole_jax.errors import UserError
from mole_jax.families import write_architecture
from mole_jax.files import PathLike, read_json
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.format import Export, Format, Given
from mole_jax.weights.formats.llava import LANGUAGE_MODELS
from mole_jax.weights.formats.merged_experts import check_no_mixture
from mole_jax.weights.hf_checkpoint import HfCheckpoint, foreign_tensors
from mole_jax.weights.hf_config import CONFIG
from mole_jax.weights.hf_folder import Beside, write_folder
from mole_jax.weights.leaf import Leaves, as_leaf, main_type
from mole_jax.weights.merge import merged
from mole_jax.weights.names import leaf_specs
from mole_jax.weights.sources import HfSource


def _recognise(given: Given) -> bool:
    return (given.path / CONFIG).exists()


def _read(given: Given) -> HfSource:
    where = given.path / CONFIG
    config = read_json(where)
    if config.get("model_type") in LANGUAGE_MODELS:
        raise UserError(f"{where}: is a language model alone; make a LLaVA of it with convert --vision CLIP_FOLDER")
    check_no_mixture(config, where=where)
    return HfSource.of(HfCheckpoint.open(str(given.path)))


def _check(export: Export) -> None:
    write_architecture(export.architecture)  # refuses learned image vectors


def _write(export: Export, folder: str) -> None:
    leaves = merged(export.leaves, export.adapter, where=export.where)
    _write_folder(folder, export.beside(), leaves)


def write_hf(
    folder: PathLike,
    arch: LlavaArchitecture,
    leaves: Leaves,
    dtype: DTypeLike | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: PathLike | None = None,
    prompt: PromptName | None = None,
    image_aspect: ImageAspect | None = None,
) -> None:
    """Writes a folder that transformers 5 loads, in the key layout of the family's files.

    Args:
        folder: made if it is not there.
        arch: the model.
        leaves: array of each path of `leaf_specs(arch)`. Of what is read when asked for, one layer is held at a time.
        dtype: type of the written weights. None: each tensor in its own.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.
        tokenizer, prompt, image_aspect: as `Beside.of` takes them.

    Raises:
        UserError: `arch` has image vectors, or as `Beside.of`.
    """
    beside = Beside.of(arch, tokenizer=tokenizer, prompt=prompt, image_aspect=image_aspect)
    _write_folder(folder, beside, leaves, dtype, max_shard_bytes)


def _write_folder(
    folder: PathLike,
    beside: Beside,
    leaves: Leaves,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    arch = beside.architecture
    config, specs = write_architecture(arch), leaf_specs(arch)
    grown = beside.leaves(leaves)
    typed = {path: as_leaf(path, grown[path], None if dtype is None else np.dtype(dtype)) for path in specs}
    tensors = foreign_tensors(specs, typed)
    config["dtype"] = main_type(tensors.values()).name
    write_folder(folder, config, beside, tensors, max_shard_bytes=max_shard_bytes)


FORMAT = Format(
    name="hf",
    reads="a HF LLaVA folder or hub name",
    recognise=_recognise,
    read=_read,
    writes="a HF LLaVA folder: plain LoRA merged",
    kinds=("none", "lora"),
    one_expert=True,
    library="transformers",
    whole=True,
    check=_check,
    write=_write,
)
